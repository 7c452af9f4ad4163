"""One file a world: a class made from env.World, and beside it what it reads."""
