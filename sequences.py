"""Sequences that grow behind a key-value cache: prefill once, then position by position.

Several actions that are tried in one state are branches of a tree: they stand beside each other
behind one shared prefix, and only the chosen one stays. So speculative decoders check their drafts.
This file knows no goals and no world.
"""

from collections.abc import Sequence

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from model import PAD, KalmForRollouts


class Sequences:
    """Sequences of positions, one a row, that grow together behind a key-value cache.

    hidden: (B, hidden), of the model's last layer at the last position of each row; what comes next
    is asked of a head there.
    """

    def __init__(self, model: KalmForRollouts, prompts: Sequence[list]):
        """Prefill: run ragged prompts, lists of `tasks.Position`, left-padded."""
        self.model = model
        self.cache = None
        self.dtype = model.get_input_embeddings().weight.dtype
        shape = len(prompts), max(map(len, prompts))
        ids = np.zeros(shape, np.int64)
        modality = np.full(shape, PAD)
        states = np.zeros((*shape, model.config.observation_dim), np.float32)
        for row, prompt in enumerate(prompts):
            for column, position in enumerate(prompt, start=shape[1] - len(prompt)):
                ids[row, column] = position.index
                modality[row, column] = position.modality
                if position.state is not None:
                    states[row, column] = position.state
        arrays = [torch.as_tensor(array, device=model.device) for array in (ids, modality, states)]
        self.mask = (arrays[1] != PAD).long()
        position_ids = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.next_position = position_ids[:, -1] + 1
        embeddings = model.embed(*arrays)
        hidden = self._run(embeddings, self.mask, position_ids)
        self.hidden = hidden[:, -1]

    def __len__(self):
        return len(self.mask)

    def select(self, rows: torch.Tensor) -> None:
        """Go on with some of the rows alone, or with a row several times."""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]
        self.next_position = self.next_position[rows]
        self.hidden = self.hidden[rows]

    def feed(self, embeddings: torch.Tensor) -> None:
        """Append one position a row. embeddings: (B, hidden), of tokens, actions or states."""
        self.mask = F.pad(self.mask, (0, 1), value=1)
        position_ids = self.next_position[:, None]
        hidden = self._run(embeddings[:, None], self.mask, position_ids)
        self.hidden = hidden[:, -1]
        self.next_position = self.next_position + 1

    def feed_branches(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Append several positions a row that stand beside each other: a tree in the attention.

        embeddings: (B, count, hidden). Each sees what came before and itself. Returns the hidden
        states there (B, count, hidden); before anything else is fed, `keep_branch` chooses.
        """
        count = embeddings.shape[1]
        if not self._cache_is_plain():  # each branch gets a row of its own, with a copied cache
            rows = torch.arange(len(self), device=self.mask.device)
            self.select(rows.repeat_interleave(count))
            self.feed(embeddings.flatten(0, 1))
            return self.hidden.unflatten(0, (-1, count))
        mask = tree_mask(self.mask, count, self.dtype)
        position_ids = self.next_position[:, None].expand(-1, count)
        self.hidden = self._run(embeddings, mask, position_ids)
        return self.hidden

    def keep_branch(self, chosen: torch.Tensor, count: int) -> None:
        """Go on with one of the count branches of each row. chosen: (B,) of their indices."""
        rows = torch.arange(len(chosen), device=chosen.device)
        if not self._cache_is_plain():
            self.select(rows * count + chosen)
            return
        length = self.mask.shape[1]
        branch = length + chosen
        for layer in self.cache.layers:
            for numbers in (layer.keys, layer.values):  # (B, heads, length + count, head_dim)
                numbers[:, :, length] = numbers[rows, :, branch]
            layer.crop(1 - count)  # all but the chosen one go
        self.mask = F.pad(self.mask, (0, 1), value=1)
        self.next_position = self.next_position + 1
        self.hidden = self.hidden[rows, chosen]

    def _cache_is_plain(self) -> bool:
        """Whether it holds all keys and values in order: no sliding window, no recurrent state."""
        return all(type(layer) is DynamicLayer for layer in self.cache.layers)

    def _run(self, embeddings, mask, position_ids):
        out = self.model.backbone.base_model(
            inputs_embeds=embeddings.to(self.dtype),
            attention_mask=mask,
            position_ids=position_ids,
            cache=self.cache,
            use_cache=True,
        )
        self.cache = out.cache
        return out.last_hidden_state


def tree_mask(mask: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Additive attention mask (B, 1, count, L + count) of branches behind prefixes.

    mask: (B, L), 0 at padding of the prefixes. A branch sees its prefix and itself.
    """
    prefix = mask[:, None].expand(-1, count, -1)
    branches = torch.eye(count, dtype=mask.dtype, device=mask.device)
    branches = branches.expand(len(mask), -1, -1)
    seen = torch.cat([prefix, branches], 2)
    additive = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    never = torch.finfo(dtype).min
    additive = additive.masked_fill(seen == 0, never)
    return additive[:, None]


@torch.inference_mode()
def decode(
    model: KalmForRollouts, prompts: Sequence[list], max_tokens: int, end: int
) -> list[list[int]]:
    """The likeliest tokens after each of ragged prompts, up to the token `end` and without it."""
    answers = [[] for _ in prompts]
    running = np.arange(len(prompts))
    sequences = Sequences(model, prompts)
    for _ in range(max_tokens):
        tokens = model.word_logits(sequences.hidden).argmax(-1)
        going = (tokens != end).nonzero()[:, 0]
        if len(going) == 0:
            break
        if len(going) < len(running):
            sequences.select(going)
            running = running[going.cpu().numpy()]
            tokens = tokens[going]
        for row, token in zip(running, tokens.tolist()):
            answers[row].append(token)
        sequences.feed(model.get_input_embeddings()(tokens))
    return answers


def row_bytes(backbone_config: PreTrainedConfig, number_size: int, positions: int) -> int:
    """Bytes of a row's cache: keys and values of so many positions, in numbers of number_size."""
    config = backbone_config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    heads = getattr(config, "num_key_value_heads", None) or heads
    numbers = 2 * config.num_hidden_layers * heads * head_dim
    return numbers * number_size * positions


def rows_that_fit(model: KalmForRollouts, positions: int, processes: int = 1) -> int:
    """Rows of a batch: of so many positions each, their caches fill at most half of the free memory
    of the model's device, of which processes on one machine's cores have a share each. At most 256.
    """
    number_size = model.get_input_embeddings().weight.element_size()
    row_size = row_bytes(model.config.backbone_config, number_size, positions)
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
    else:
        free = psutil.virtual_memory().available // processes
    fitting = free // 2 // row_size
    return int(min(max(1, fitting), 256))


def fitting_batch(model: KalmForRollouts, positions: int, shared: bool) -> int:
    """Rows of a batch for which there is memory; of work that is shared, on all processes."""
    fitting = rows_that_fit(model, positions, PartialState().num_processes)
    return min(gather_object([fitting])) if shared else fitting
