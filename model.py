"""KALM's grounded language model: any causal LM of transformers, with eyes (state embedding) and hands (action heads).

One sequence mixes text tokens, states and actions. Each modality has its own input embedding into the LM's hidden size
and its own output head; the head at a position predicts what comes next (paper, section 4.1).
This file knows dimensions but nothing of CLEVR-Robot, goals or files of rollouts.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Cache, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

PAD, TEXT, STATE, ACTION = -1, 0, 1, 2  # modality of a position
SEGMENTS = 1024  # at most so many segments in an example
TASKS = ("dynamics", "explanation", "generation", "consequence", "description")


class KalmConfig(PretrainedConfig):
    """What builds a KalmForRollouts besides its weights.

    backbone_config: configuration of the causal LM, as an object or a dict with `model_type`.
    observation_mean, observation_std: (observation_dim,) statistics that normalise states inside the model.
    change_std: (observation_dim,) scale of one-step state changes; the state head predicts changes in these units.
    objects: how many like objects a state lists, each with as many numbers; an action is object * moves + move.
    frequencies: angular frequencies of the sines and cosines that each normalised number of a state enters as, beside itself.
    embedding_rms: root mean square that state and action embeddings start with.
    lora_rank: 0 tunes the backbone's own weights, else low-rank adapters on all its linear layers (needs peft).
    """
    model_type = "kalm"
    sub_configs = {"backbone_config": AutoConfig}

    def __init__(self, backbone_config=None, observation_dim=10, num_actions=40, observation_mean=None, observation_std=None,
                 change_std=None, objects=1, frequencies=(1, 2, 4, 8), embedding_rms=0.02, head_width=512, lora_rank=0,
                 **kwargs):
        if isinstance(backbone_config, dict):
            backbone_config = AutoConfig.for_model(**backbone_config)
        self.backbone_config = backbone_config
        self.observation_dim, self.num_actions = observation_dim, num_actions
        self.observation_mean = list(observation_mean or [0.0] * observation_dim)
        self.observation_std = list(observation_std or [1.0] * observation_dim)
        self.change_std = list(change_std or [1.0] * observation_dim)
        self.objects, self.frequencies = objects, list(frequencies)
        self.embedding_rms, self.head_width, self.lora_rank = embedding_rms, head_width, lora_rank
        super().__init__(**kwargs)


@dataclass
class KalmOutput(ModelOutput):
    """loss: scalar; {text,action,state}_loss: its parts; task_losses: (5,) in the order of TASKS, 0 where absent.

    state_pred: (B, L, observation_dim), the next state where it is asked for: before each state of `predict`, or without that after each
    action; the current state elsewhere. action_logits: (B, L, num_actions); logits: (B, text_logits, vocabulary) where asked for.
    """
    loss: Optional[torch.Tensor] = None
    text_loss: Optional[torch.Tensor] = None
    action_loss: Optional[torch.Tensor] = None
    state_loss: Optional[torch.Tensor] = None
    task_losses: Optional[torch.Tensor] = None
    state_pred: Optional[torch.Tensor] = None
    action_logits: Optional[torch.Tensor] = None
    logits: Optional[torch.Tensor] = None
    cache: Optional[Cache] = None


_PEFT_PREFIX = "base_model.model."


def lora_config(rank):
    """peft's configuration of the low-rank adapters: on all linear layers but the output."""
    from peft import LoraConfig
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def segment_mask(segments, dtype):
    """Additive attention mask (B, 1, L, L) for rows that pack examples of one prompt and several rollouts each.

    segments: (B, L) int, example * SEGMENTS + segment; segment 0 is the example's prompt, 1.. are rollouts, which see the
    prompt but not each other; -1 is padding. Attention is causal, and never leaves an example.
    """
    query, key = segments[:, :, None], segments[:, None, :]
    position = torch.arange(segments.shape[1], device=segments.device)
    seen = (position[:, None] >= position) & ((query == key) | (key == query - query % SEGMENTS))
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


class KalmForRollouts(PreTrainedModel):
    """A causal LM with state and action embeddings and heads. See `forward` for the sequence format."""
    config_class = KalmConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.backbone = AutoModelForCausalLM.from_config(config.backbone_config)
        hidden, width = config.backbone_config.get_text_config().hidden_size, config.head_width
        features = config.observation_dim * (1 + 2 * len(config.frequencies))
        self.state_embedding = nn.Sequential(nn.Linear(features, width), nn.GELU(), nn.Linear(width, hidden))
        self.action_embedding = nn.Embedding(config.num_actions, hidden)
        view = (2 * config.objects - 1) * features // config.objects + config.num_actions // config.objects
        self.state_head = nn.Sequential(nn.Linear(hidden + view, 2 * width), nn.GELU(), nn.Linear(2 * width, 2 * width), nn.GELU(),
                                        nn.Linear(2 * width, config.observation_dim))
        self.action_head = nn.Sequential(nn.Linear(hidden, width), nn.GELU(), nn.Linear(width, config.num_actions))
        for name in ("observation_mean", "observation_std", "change_std"):
            self.register_buffer(name, torch.tensor(getattr(config, name), dtype=torch.float32))
        self.post_init()
        if config.lora_rank:  # after post_init, which would start the adapters anew: they begin as no change at all
            from peft import inject_adapter_in_model
            inject_adapter_in_model(lora_config(config.lora_rank), self.backbone)

    def _init_weights(self, module):
        """New layers only: torch's own start, and embeddings that start at `embedding_rms`."""
        if module is self.action_embedding:
            nn.init.normal_(module.weight, std=self.config.embedding_rms)
        elif module is self.state_embedding[2]:  # its input layer came before, so a sample shows the scale to correct
            module.reset_parameters()
            sample = torch.randn(256, self.config.observation_dim, generator=torch.Generator().manual_seed(0))
            scale = self.state_embedding(self.waves(sample.to(module.weight))).square().mean().sqrt()
            module.weight.mul_(self.config.embedding_rms / scale)
            module.bias.mul_(self.config.embedding_rms / scale)
        elif isinstance(module, nn.Linear):
            module.reset_parameters()
            if module is self.state_head[0]:  # begins with what it sees, and learns what the hidden state adds
                module.weight[:, :self.config.backbone_config.get_text_config().hidden_size] = 0

    @classmethod
    def from_llm(cls, llm, embedding_scale=1.0, seed=0, **config):
        """Wrap a causal LM that transformers has loaded. config: fields of KalmConfig.

        New embeddings start at embedding_scale times the root mean square of the token embeddings.
        """
        torch.manual_seed(seed)
        rms = llm.get_input_embeddings().weight.detach().float().square().mean().sqrt().item()
        backbone = {**llm.config.to_dict(), "_name_or_path": ""}  # a folder of this machine is no part of it
        model = cls(KalmConfig(backbone_config=backbone, embedding_rms=embedding_scale * rms, **config))
        model._copy_backbone(llm)
        return model

    @classmethod
    def from_adapter(cls, llm, folder):
        """A causal LM with the layers and LoRA that `save_adapter` wrote. Raises ValueError if they do not fit together."""
        folder = Path(folder)
        model = cls(KalmConfig.from_pretrained(folder))
        for name in ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
            theirs, ours = (getattr(c.get_text_config(), name, None) for c in (model.config.backbone_config, llm.config))
            if theirs != ours:
                raise ValueError(f"{folder} was made for a language model with {name} {theirs}, and this one has {ours}")
        model._copy_backbone(llm)
        tensors = {**load_file(folder / "new_layers.safetensors"), **{
            "backbone." + k.removeprefix(_PEFT_PREFIX).replace(".weight", ".default.weight"): v
            for k, v in load_file(folder / "adapter_model.safetensors").items()}}
        if set(tensors) != set(model.new_parameters()):
            odd = sorted(set(tensors) ^ set(model.new_parameters()))[0]
            raise ValueError(f"{folder}: the tensor {odd} is missing or unknown")
        model.load_state_dict(tensors, strict=False)
        return model

    def save_adapter(self, folder):
        """What grounding added to the LLM, as bfloat16: LoRA as peft stores it, the new layers, the configuration."""
        folder, parameters = Path(folder), dict(self.named_parameters())
        new = {name: parameters[name].detach().to("cpu", torch.bfloat16).contiguous() for name in self.new_parameters()}
        save_file({k: v for k, v in new.items() if not k.startswith("backbone.")}, folder / "new_layers.safetensors")
        save_file({_PEFT_PREFIX + k.removeprefix("backbone.").replace(".default.", "."): v for k, v in new.items()
                   if k.startswith("backbone.")}, folder / "adapter_model.safetensors", {"format": "pt"})
        lora_config(self.config.lora_rank).save_pretrained(folder)
        self.config.save_pretrained(folder)

    def merge_adapters(self):
        """Add LoRA's products to the weights they adapt, in place: the same function, computed faster. Returns self."""
        for module in self.backbone.modules():
            if hasattr(module, "lora_A"):
                module.merge()
        return self

    @torch.no_grad()
    def _copy_backbone(self, llm):
        weights = llm.state_dict()
        for name, parameter in self.backbone.state_dict().items():
            if ".lora_" not in name:
                parameter.copy_(weights[name.replace(".base_layer", "")])

    def get_input_embeddings(self):
        return self.backbone.get_input_embeddings()

    def new_parameters(self):
        """Names of the parameters that grounding adds: everything outside the backbone, and LoRA's adapters."""
        return [name for name, _ in self.named_parameters() if not name.startswith("backbone.") or ".lora_" in name]

    def waves(self, numbers):
        """Normalised numbers (..., N) with their sines and cosines, (..., N * (1 + 2 * frequencies))."""
        return torch.cat([numbers, *(wave(numbers * w) for w in self.config.frequencies for wave in (torch.sin, torch.cos))], -1)

    def embed(self, input_ids, modality, states):
        """Input embeddings (B, L, D) of an interleaved sequence; arguments as in `forward`."""
        tokens = self.get_input_embeddings()(input_ids.where(modality == TEXT, 0))
        actions = self.action_embedding(input_ids.where(modality == ACTION, 0))
        seen = self.state_embedding(self.waves((states - self.observation_mean) / self.observation_std))
        is_state, is_action = (modality == STATE)[..., None], (modality == ACTION)[..., None]
        return torch.where(is_state, seen.to(tokens.dtype), torch.where(is_action, actions.to(tokens.dtype), tokens))

    def acted_view(self, input_ids, modality, states):
        """A state as the object that an action moves sees it: that object first, then the others by their distance from it.

        Physics is the same for every object, so the state head need not learn it for each. Returns the features (B, L, F),
        and which object comes at each place (B, L, objects); without an action they come as the state lists them.
        """
        moves, is_action = self.config.num_actions // self.config.objects, modality == ACTION
        objects = states.unflatten(-1, (self.config.objects, -1))
        acted = torch.where(is_action, input_ids // moves, 0)[..., None]
        distance = (objects - objects.take_along_dim(acted[..., None], 2)).norm(dim=-1).scatter(-1, acted, -1)
        order = torch.where(is_action[..., None], distance.argsort(-1), torch.arange(self.config.objects, device=states.device))
        objects = objects.take_along_dim(order[..., None], 2)
        places = (objects.flatten(-2) - self.observation_mean) / self.observation_std
        offsets = ((objects[..., 1:, :] - objects[..., :1, :]).flatten(-2)) / self.observation_std[:-objects.shape[-1]]
        move = F.one_hot(input_ids % moves, moves) * is_action[..., None]
        return torch.cat([self.waves(torch.cat([places, offsets], -1)), move], -1), order

    def forward(self, input_ids, modality, states, segments=None, attention_mask=None, position_ids=None, predict=None,
                task=None, cache=None, use_cache=False, text_logits=0):
        """Run an interleaved sequence of text, states and actions.

        input_ids: (B, L) int64, the token or action index of each position (0 at states).
        modality: (B, L) int64 of TEXT, STATE, ACTION or PAD.
        states: (B, L, observation_dim), at a state position the state, at an action position the state it is taken in.
        segments: (B, L), see `segment_mask`; or attention_mask: (B, past + L) with 0 at padding, as in transformers.
        position_ids: (B, L); segments that share a prefix all go on where it ends.
        predict: (B, L) bool, the positions whose content is to be predicted from the position before; gives `loss`.
        task: (B, L) int64 index into TASKS, for the losses by task.
        text_logits: the last so many positions also get `logits`, which cost as much as several layers; None: all.
        """
        embeddings = self.embed(input_ids, modality, states)
        if segments is not None:
            attention_mask = segment_mask(segments, embeddings.dtype)
        out = self.backbone.base_model(inputs_embeds=embeddings, attention_mask=attention_mask, position_ids=position_ids,
                                       cache=cache, use_cache=use_cache)
        hidden = out.last_hidden_state
        result = KalmOutput(cache=out.cache if use_cache else None)
        if text_logits != 0:
            result.logits = self.backbone.get_output_embeddings()(hidden[:, -text_logits:] if text_logits else hidden)
        result.action_logits = self.action_head(hidden)
        asked = (modality == ACTION) if predict is None else F.pad((modality[:, 1:] == STATE) & predict[:, 1:], (0, 1))
        view, order = self.acted_view(*(x[asked][None] for x in (input_ids, modality, states)))
        told = self.state_head(torch.cat([hidden[asked][None], view.to(hidden.dtype)], -1)).unflatten(-1, (self.config.objects, -1))
        change = torch.zeros_like(states, dtype=torch.float32)
        change[asked] = told.take_along_dim(order.argsort(-1)[..., None], -2).flatten(-2)[0].float()  # each object back in its place
        result.state_pred = states + change * self.change_std
        if predict is not None:
            self._add_losses(result, hidden, change, input_ids, modality, states, predict, task)
        return result

    def _add_losses(self, result, hidden, change, input_ids, modality, states, predict, task):
        """Cross entropy for text and actions, squared error for states, means over their positions (paper, eq. 1-3)."""
        nexts, ahead = modality[:, 1:], predict[:, 1:]
        at = {kind: (ahead & (nexts == kind)).nonzero(as_tuple=True) for kind in (TEXT, ACTION, STATE)}
        text, action, state = at[TEXT], at[ACTION], at[STATE]
        text_logits = self.backbone.get_output_embeddings()(hidden[:, :-1][text])
        losses = {
            TEXT: F.cross_entropy(text_logits.float(), input_ids[:, 1:][text], reduction="none"),
            ACTION: F.cross_entropy(result.action_logits[:, :-1][action].float(), input_ids[:, 1:][action], reduction="none"),
            STATE: ((states[:, 1:][state] - states[:, :-1][state]) / self.change_std - change[:, :-1][state]).square().mean(-1)}
        result.text_loss, result.action_loss, result.state_loss = (_mean(losses[k]) for k in (TEXT, ACTION, STATE))
        result.loss = result.text_loss + 0.5 * result.action_loss + 0.5 * result.state_loss
        if task is not None:
            by_task = {kind: task[:, 1:][at[kind]] for kind in at}
            result.task_losses = torch.stack([sum(
                weight * _mean(losses[kind].detach()[by_task[kind] == t]) for kind, weight in ((TEXT, 1), (ACTION, 0.5), (STATE, 0.5)))
                for t in range(len(TASKS))])


def _mean(losses):
    """Mean that is 0, with a gradient of 0, where there is nothing to average."""
    return losses.sum() / max(len(losses), 1)


AutoConfig.register("kalm", KalmConfig)
AutoModel.register(KalmConfig, KalmForRollouts)
