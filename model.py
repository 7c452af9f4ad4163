"""KALM's grounded language model: a causal LM with eyes (state embedding) and hands (action head).

One sequence mixes text tokens, states and actions. Each modality has its own embedding into the
LM's hidden size and its own output head; the head at a position predicts what comes next (paper,
section 4.1). This file knows dimensions but no world, no goals and no files of rollouts.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput, cached_file

from data.llm import check_shapes, load_described

PAD, TEXT, STATE, ACTION, RETURN = -1, 0, 1, 2, 3  # modality of a position
SEGMENTS = 1024  # at most so many segments in an example
TASKS = ("dynamics", "explanation", "generation", "consequence", "description")
LOSS_WEIGHTS = {"text": 1.0, "action": 0.5, "state": 0.5}  # paper, section 4.1
STATISTICS = ("observation_mean", "observation_std", "change_std")
MODALITIES = {"text": TEXT, "action": ACTION, "state": STATE}


class KalmConfig(PreTrainedConfig):
    """What builds a KalmForRollouts besides its weights.

    backbone_config: configuration of the causal LM, as an object or a dict with `model_type`.
    observation_mean, observation_std: (observation_dim,), normalise states inside the model.
    change_std: (observation_dim,), of one-step changes: the unit of what the state head predicts.
    objects: how many like objects a state lists; an action is object * moves + move.
    frequencies: of the sines and cosines that enter beside each normalised number of a state.
    embedding_rms: root mean square that state and action embeddings start with.
    lora_rank: of adapters on the linear layers that lora_targets names with commas ("all-linear":
    all but the output), whose product counts lora_alpha / lora_rank times; 0: all weights train.
    base: the language model that adapters belong to, as `data.llm.describe` gives it.
    """

    model_type = "kalm"
    sub_configs = {"backbone_config": AutoConfig}

    def __init__(
        self,
        backbone_config=None,
        observation_dim=10,
        num_actions=40,
        observation_mean=None,
        observation_std=None,
        change_std=None,
        objects=1,
        frequencies=(1, 2, 4, 8),
        embedding_rms=0.02,
        head_width=512,
        lora_rank=0,
        lora_alpha=0,
        lora_dropout=0.0,
        lora_targets="all-linear",
        base=None,
        **kwargs,
    ):
        if isinstance(backbone_config, dict):
            backbone_config = AutoConfig.for_model(**backbone_config)
        self.backbone_config = backbone_config
        self.observation_dim = observation_dim
        self.num_actions = num_actions
        self.observation_mean = list(observation_mean or [0.0] * observation_dim)
        self.observation_std = list(observation_std or [1.0] * observation_dim)
        self.change_std = list(change_std or [1.0] * observation_dim)
        self.objects = objects
        self.frequencies = list(frequencies)
        self.embedding_rms = embedding_rms
        self.head_width = head_width
        self.lora_rank = lora_rank
        self.lora_alpha = lora_alpha or 2 * lora_rank
        self.lora_dropout = lora_dropout
        self.lora_targets = lora_targets
        self.base = base
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of the backbone's hidden states."""
        return self.backbone_config.get_text_config().hidden_size


@dataclass
class KalmOutput(ModelOutput):
    """loss: scalar; losses: its parts; task_losses: (len(TASKS),), 0 where a task is absent.

    state_pred: (B, L, observation_dim), the next state before each state of `predict`, or without
    that after each action; the current one elsewhere. action_logits: (B, L, num_actions). logits:
    (B, text_logits, vocabulary) where asked for. text_losses: (N,), of the text positions of
    `predict`, row by row.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    task_losses: Tensor | None = None
    text_losses: Tensor | None = None
    state_pred: Tensor | None = None
    action_logits: Tensor | None = None
    logits: Tensor | None = None


# ----------------------------------------------------------------------------------------------
# Attention and losses


def segment_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask (B, 1, L, L) of packed examples: a prompt and several rollouts each.

    segments: (B, L) int, example * SEGMENTS + segment; segment 0 is the example's prompt, 1.. are
    rollouts, which see the prompt but not each other; -1 is padding. Attention is causal.
    """
    query = segments[:, :, None]
    key = segments[:, None, :]
    position = torch.arange(segments.shape[1], device=segments.device)
    causal = position[:, None] >= position
    prompt_of_query = query - query % SEGMENTS
    seen = causal & ((query == key) | (key == prompt_of_query))
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def weighted_sum(losses: dict[str, Tensor]) -> Tensor:
    """The grounding loss of its parts (paper, eq. 1-3)."""
    return sum(LOSS_WEIGHTS[name] * loss for name, loss in losses.items())


def matching(layers: nn.Module, numbers: Tensor) -> Tensor:
    """Numbers in the type of the layers that they enter."""
    return numbers.to(next(layers.parameters()).dtype)


def root_mean_square(numbers: Tensor) -> float:
    """Their size, computed without a float32 copy of them all."""
    squares = [part.float().square().sum().item() for part in numbers.split(4096)]
    return (sum(squares) / numbers.numel()) ** 0.5


def mean_or_zero(losses: Tensor) -> Tensor:
    """Mean of losses (N,); 0, with a gradient of 0, where there are none."""
    return losses.sum() / max(len(losses), 1)


def task_losses(losses: dict[str, Tensor], tasks: dict[str, Tensor]) -> Tensor:
    """The loss of each task, (len(TASKS),). losses, tasks: (N,) by modality."""
    by_task = []
    for task in range(len(TASKS)):
        parts = {}
        for name, values in losses.items():
            parts[name] = mean_or_zero(values.detach()[tasks[name] == task])
        by_task.append(weighted_sum(parts))
    return torch.stack(by_task)


def is_new(name: str) -> bool:
    """Whether grounding adds a parameter of this name, or the LLM had it."""
    return not name.startswith("backbone.") or ".lora_" in name


class KalmForRollouts(PreTrainedModel):
    """A causal LM with state and action embeddings and heads; `forward` tells the format."""

    config_class = KalmConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    target_return = None  # what a Decision Transformer asks for (dt.py)

    def __init__(self, config: KalmConfig, backbone: PreTrainedModel | None = None):
        """backbone: a causal LM to adopt as it is; None: a new one of the configuration."""
        super().__init__(config)
        if backbone is None:
            backbone = AutoModelForCausalLM.from_config(config.backbone_config)
        else:
            for module in backbone.modules():
                module._is_hf_initialized = True  # or post_init would start its weights anew
        self.backbone = backbone
        hidden = config.hidden_size
        width = config.head_width
        features = config.observation_dim * (1 + 2 * len(config.frequencies))
        self.state_embedding = nn.Sequential(
            nn.Linear(features, width), nn.GELU(), nn.Linear(width, hidden)
        )
        self.action_embedding = nn.Embedding(config.num_actions, hidden)
        # What `acted_view` gives: places of all objects, offsets of all but one, the move.
        moves = config.num_actions // config.objects
        view = (2 * config.objects - 1) * (features // config.objects) + moves
        self.state_head = nn.Sequential(
            nn.Linear(hidden + view, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, config.observation_dim),
        )
        self.action_head = nn.Sequential(
            nn.Linear(hidden, width), nn.GELU(), nn.Linear(width, config.num_actions)
        )
        for name in STATISTICS:  # the configuration keeps them
            statistic = torch.tensor(getattr(config, name), dtype=torch.float32)
            self.register_buffer(name, statistic, persistent=False)
        self.post_init()
        if config.lora_rank:  # after post_init: adapters begin as no change at all
            inject_adapter_in_model(lora_config(config), self.backbone)
            for name, parameter in self.backbone.named_parameters():
                if ".lora_" in name:  # float32, whatever the weights that they add to
                    parameter.data = parameter.data.float()

    def _init_weights(self, module):
        """New layers only: torch's own start, and embeddings that start at `embedding_rms`."""
        rms = self.config.embedding_rms
        if module is self:
            for name in STATISTICS:  # lost where transformers builds a model without memory first
                getattr(self, name).copy_(torch.tensor(getattr(self.config, name)))
        elif module is self.action_embedding:
            nn.init.normal_(module.weight, std=rms)
        elif module is self.state_embedding[2]:
            # Its input layer came before, so a sample shows the scale to correct.
            module.reset_parameters()
            generator = torch.Generator().manual_seed(0)
            sample = torch.randn(256, self.config.observation_dim, generator=generator)
            embedded = self.state_embedding(self.waves(sample.to(module.weight)))
            scale = embedded.square().mean().sqrt()
            module.weight.mul_(rms / scale)
            module.bias.mul_(rms / scale)
        elif isinstance(module, nn.Linear):
            module.reset_parameters()
            if module is self.state_head[0]:
                # Begins with the view alone, and learns what the hidden state adds.
                module.weight[:, : self.config.hidden_size] = 0

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    def new_parameters(self) -> list[str]:
        """Names of what grounding adds: all outside of the backbone, and LoRA's adapters."""
        names = [name for name, _ in self.named_parameters() if is_new(name)]
        return [name.replace("_checkpoint_wrapped_module.", "") for name in names]  # FSDP's

    def waves(self, numbers: Tensor) -> Tensor:
        """Normalised numbers (..., N) with sines and cosines, (..., N * (1 + 2 * frequencies))."""
        features = [numbers]
        for frequency in self.config.frequencies:
            features.append(torch.sin(numbers * frequency))
            features.append(torch.cos(numbers * frequency))
        return torch.cat(features, -1)

    def embed(self, input_ids: Tensor, modality: Tensor, states: Tensor) -> Tensor:
        """Input embeddings (B, L, hidden) of an interleaved sequence; arguments as in `forward`."""
        is_state = (modality == STATE)[..., None]
        is_action = (modality == ACTION)[..., None]
        tokens = self.get_input_embeddings()(input_ids.where(modality == TEXT, 0))
        actions = self.action_embedding(input_ids.where(modality == ACTION, 0))
        embedded = torch.where(is_action, actions.to(tokens.dtype), tokens)
        return torch.where(is_state, self.embed_states(states).to(tokens.dtype), embedded)

    def embed_states(self, states: Tensor) -> Tensor:
        """Input embeddings (..., hidden) of states (..., observation_dim)."""
        waves = self.waves((states - self.observation_mean) / self.observation_std)
        return self.state_embedding(matching(self.state_embedding, waves))

    def forward(
        self,
        input_ids: Tensor,
        modality: Tensor,
        states: Tensor,
        segments: Tensor | None = None,
        position_ids: Tensor | None = None,
        predict: Tensor | None = None,
        task: Tensor | None = None,
        text_logits: int | None = 0,
    ) -> KalmOutput:
        """Run an interleaved sequence of text, states and actions.

        input_ids: (B, L) int64, the token or action index of each position (0 at states).
        modality: (B, L) int64 of TEXT, STATE, ACTION or PAD.
        states: (B, L, observation_dim), at a state its numbers, at an action those before it.
        segments: (B, L), see `segment_mask`; None: causal attention alone.
        position_ids: (B, L); segments that share a prompt all go on where it ends.
        predict: (B, L) bool, the positions to be predicted from the position before; gives `loss`.
        task: (B, L) int64 index into TASKS, for the losses by task.
        text_logits: the last so many positions also get `logits`, which are costly; None: all.
        """
        embeddings = self.embed(input_ids, modality, states)
        mask = None if segments is None else segment_mask(segments, embeddings.dtype)
        out = self.backbone.base_model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=False,
        )
        hidden = out.last_hidden_state
        result = KalmOutput()
        if text_logits != 0:
            result.logits = self.word_logits(hidden[:, -text_logits:] if text_logits else hidden)
        result.action_logits = self.action_logits(hidden)

        # The state head is asked only where a next state is wanted: it is wider than the others.
        if predict is None:
            asked = modality == ACTION
        else:
            before_a_state = (modality[:, 1:] == STATE) & predict[:, 1:]
            asked = F.pad(before_a_state, (0, 1))
        change = torch.zeros_like(states, dtype=torch.float32)  # in units of change_std
        change[asked] = self.predict_change(
            hidden[asked], input_ids[asked], modality[asked] == ACTION, states[asked]
        )
        result.state_pred = states + change * self.change_std
        if predict is not None:
            self._add_losses(result, hidden, change, input_ids, modality, states, predict, task)
        return result

    def action_logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., num_actions) of the next action from hidden states (..., hidden)."""
        return self.action_head(matching(self.action_head, hidden))

    def word_logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocabulary) of the next token from hidden states (..., hidden)."""
        head = self.get_output_embeddings()
        logits = head(matching(head, hidden))
        text = self.config.backbone_config.get_text_config()
        # What some LLMs do to their logits: Cohere, Granite, Gemma-2.
        scale = getattr(text, "logit_scale", None) or 1
        logits = logits * scale / (getattr(text, "logits_scaling", None) or 1)
        cap = getattr(text, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    # The state head: physics is the same for every object, so it need not be learned for each

    def predict_change(
        self, hidden: Tensor, input_ids: Tensor, is_action: Tensor, states: Tensor
    ) -> Tensor:
        """How states change by the action at their position, (N, observation_dim), in units of
        change_std.

        hidden: (N, hidden); input_ids: (N,); is_action: (N,) bool; states: (N, observation_dim).
        """
        order = self.order_from_acted(input_ids, is_action, states)
        view = self.acted_view(input_ids, is_action, states, order)
        features = torch.cat([hidden, view.to(hidden.dtype)], -1)
        change = self.state_head(matching(self.state_head, features))
        change = change.unflatten(-1, (self.config.objects, -1))
        back_in_place = order.argsort(-1)[..., None]
        return change.take_along_dim(back_in_place, -2).flatten(-2).float()

    def order_from_acted(self, input_ids: Tensor, is_action: Tensor, states: Tensor) -> Tensor:
        """The objects as one that an action moves sees them: itself first, then the others by
        distance, (N, objects).

        At positions without an action they come as the state lists them.
        """
        moves = self.config.num_actions // self.config.objects
        objects = states.unflatten(-1, (self.config.objects, -1))
        acted = torch.where(is_action, input_ids // moves, 0)[..., None]
        offset = objects - objects.take_along_dim(acted[..., None], -2)
        distance = offset.norm(dim=-1)
        distance = distance.scatter(-1, acted, -1)  # the acted object before one at its place
        as_listed = torch.arange(self.config.objects, device=states.device)
        return torch.where(is_action[..., None], distance.argsort(-1), as_listed)

    def acted_view(
        self, input_ids: Tensor, is_action: Tensor, states: Tensor, order: Tensor
    ) -> Tensor:
        """Places of objects in an order (N, objects), offsets from the first, and the move: (N,
        features).
        """
        moves = self.config.num_actions // self.config.objects
        objects = states.unflatten(-1, (self.config.objects, -1))
        objects = objects.take_along_dim(order[..., None], -2)
        numbers = objects.shape[-1]
        places = (objects.flatten(-2) - self.observation_mean) / self.observation_std
        offsets = (objects[..., 1:, :] - objects[..., :1, :]).flatten(-2)
        offsets = offsets / self.observation_std[:-numbers]
        move = F.one_hot(input_ids % moves, moves) * is_action[..., None]
        return torch.cat([self.waves(torch.cat([places, offsets], -1)), move], -1)

    def _add_losses(self, result, hidden, change, input_ids, modality, states, predict, task):
        """Cross entropy for text and actions, squared error for states (paper, eq. 1-3)."""
        predicted = {}  # by modality, the positions (row, column) whose successor is predicted
        for name, kind in MODALITIES.items():
            ahead = predict[:, 1:] & (modality[:, 1:] == kind)
            predicted[name] = ahead.nonzero(as_tuple=True)
        text, action, state = (predicted[name] for name in ("text", "action", "state"))
        next_ids = input_ids[:, 1:]
        text_logits = self.word_logits(hidden[:, :-1][text])
        action_logits = result.action_logits[:, :-1][action]
        true_change = (states[:, 1:][state] - states[:, :-1][state]) / self.change_std
        error = true_change - change[:, :-1][state]
        losses = {
            "text": F.cross_entropy(text_logits.float(), next_ids[text], reduction="none"),
            "action": F.cross_entropy(action_logits.float(), next_ids[action], reduction="none"),
            "state": error.square().mean(-1),
        }
        means = {name: mean_or_zero(values) for name, values in losses.items()}
        result.losses = means
        result.text_losses = losses["text"]
        result.loss = weighted_sum(means)
        if task is not None:
            tasks = {name: task[:, 1:][where] for name, where in predicted.items()}
            result.task_losses = task_losses(losses, tasks)

    # Around an LLM, and on disk

    @classmethod
    @torch.no_grad()
    def from_llm(cls, llm: PreTrainedModel, embedding_scale: float = 1.0, seed: int = 0, **config):
        """Adopt a causal LM. config: fields of KalmConfig.

        New embeddings start at embedding_scale times the root mean square of the token embeddings.
        """
        torch.manual_seed(seed)
        tokens = llm.get_input_embeddings()
        some = torch.arange(min(64, len(tokens.weight)), device=llm.device)
        gain = root_mean_square(tokens(some)) / root_mean_square(tokens.weight[some])  # Gemma's
        rms = embedding_scale * gain * root_mean_square(tokens.weight)
        backbone = llm.config.to_dict()
        backbone["_name_or_path"] = ""  # a folder of this machine is no part of it
        backbone.pop("quantization_config", None)  # nor is how it was loaded
        config = KalmConfig(backbone_config=backbone, embedding_rms=rms, **config)
        return cls(config, backbone=llm)

    @classmethod
    def from_pretrained(cls, folder, *args, llm: PreTrainedModel | None = None, **kwargs):
        """As transformers does. With LoRA a folder has what was trained alone, which is put on
        `llm`, or on the LLM that it was trained on, loaded from where that was.

        Raises ValueError for an LLM that is gone or another, and for weights that do not fit.
        """
        config = kwargs.get("config") or KalmConfig.from_pretrained(folder)
        if not config.lora_rank:
            return super().from_pretrained(folder, *args, **kwargs)
        if llm is None:
            dtype = kwargs.get("dtype")
            options = {"dtype": dtype if isinstance(dtype, torch.dtype) else torch.float32}
            options["in_4bit"] = kwargs.get("in_4bit", False)
            llm = load_described(config.base, config.backbone_config, **options)
        check_shapes(llm, config.backbone_config, str(folder))
        model = cls(config, backbone=llm)
        weights = load_file(cached_file(folder, "model.safetensors"))
        different = set(weights) ^ set(model.new_parameters())
        if different:
            raise ValueError(f"{folder}: the tensor {min(different)} is missing or unknown")
        model.load_state_dict(weights, strict=False)
        return model.eval()

    def save_pretrained(self, folder, state_dict: dict | None = None, **kwargs) -> None:
        """As transformers does, but under our own names, on which the Trainer's resume relies; with
        LoRA, what was trained alone.
        """
        if self.config.lora_rank:
            weights = self.state_dict() if state_dict is None else state_dict
            state_dict = {name: weights[name] for name in self.new_parameters()}
        super().save_pretrained(folder, state_dict=state_dict, save_original_format=False, **kwargs)

    @torch.no_grad()
    def merge_adapters(self) -> "KalmForRollouts":
        """Add LoRA's products to the weights that they adapt, and drop it: the same, faster."""
        for name, module in reversed([*self.backbone.named_modules()]):  # one may wrap another
            if hasattr(module, "lora_A"):
                is_of_experts = hasattr(module, "get_param")
                weight = module.get_param() if is_of_experts else module.base_layer.weight
                product = module.get_delta_weight("default")  # float32: rounded once, in the sum
                weight.copy_(weight.float() + product)
                self.backbone.set_submodule(name, module.base_layer)
        self.config.lora_rank = 0
        return self


def lora_config(config: KalmConfig) -> LoraConfig:
    """peft's configuration of the low-rank adapters."""
    targets = config.lora_targets
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets if targets == "all-linear" else targets.split(","),
        task_type="CAUSAL_LM",
    )


AutoConfig.register("kalm", KalmConfig)
AutoModel.register(KalmConfig, KalmForRollouts)
