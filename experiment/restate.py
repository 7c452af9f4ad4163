"""Goals in words that training never had, said again in words that it had, by what the LLM knows.

Fine-tuning learns a handful of words by heart, and nothing of words like them. The LLM as it was
before can tell in a sentence of its own which known word comes nearest: asked with a hint, it goes
on with one. This file knows a language model and a world's lexicon, and nothing of judges.
"""

import itertools
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from tasks import Tokenizer, text_ids

ROWS = 16  # prompts at once
# Words that mean nothing in particular: what the LLM says of these, it says of any word
ANY_WORDS = "table person idea house thing water paper car game number music story window".split()


@torch.inference_mode()
def meanings(
    words: Sequence[str], lexicon, llm: PreTrainedModel, tokenizer: Tokenizer
) -> dict[str, Tensor]:
    """How much likelier each known word is for a new one than for any word: logarithms (answers,).

    lexicon: a world's; its hint has {} for the new word, and one of its answers is to follow, which
    counts by its first token.
    """
    first = []
    for answer in lexicon.answers:
        first.append(text_ids(tokenizer, f" {answer}")[0])
    asked = []
    for word in (*words, *ANY_WORDS):
        prompt = text_ids(tokenizer, lexicon.hint.format(word))
        asked.append(torch.tensor(prompt))
    found = []
    for start in range(0, len(asked), ROWS):
        prompts = asked[start : start + ROWS]
        ids = pad_sequence(prompts, batch_first=True)  # what is behind a prompt does not change it
        logits = llm(ids.to(llm.device)).logits
        for prompt, row in zip(prompts, logits):
            next_word = row[len(prompt) - 1].float().log_softmax(-1)
            found.append(next_word[first].cpu())
    of_any = torch.stack(found[len(words) :]).mean(0)
    return {word: logs - of_any for word, logs in zip(words, found)}


def restate(text: str, lexicon, of_words: Mapping[str, Tensor]) -> str:
    """The text with its new words replaced by known ones, each by another that it does not have
    yet: those that are likeliest together. lexicon: a world's; of_words: as `meanings` gives them.
    """
    places = lexicon.places(text)
    words = list(dict.fromkeys(place[1] for place in places))
    said = re.findall(r"\w+", text.lower())
    free = []
    for i, answer in enumerate(lexicon.answers):
        if answer not in said:
            free.append(i)

    def likelihood(chosen):
        logs = [of_words[word][i] for word, i in zip(words, chosen)]
        return sum(logs)

    best = max(itertools.permutations(free, len(words)), key=likelihood, default=())
    known = {word: lexicon.answers[i] for word, i in zip(words, best)}
    for place in reversed(places):
        start, end = place.span(1)
        known_word = known.get(place[1], place[1])
        text = text[:start] + known_word + text[end:]
    return text
