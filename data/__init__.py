"""Goal sentences and the language model: see README.md in this folder."""
