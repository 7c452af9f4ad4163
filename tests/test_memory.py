"""Memory: the estimate of a plan beside what grounding took, and what a launch starts."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT, grounding_settings
from safetensors.torch import load_file

import ground
import kalm
from experiment import memory
from model import KalmConfig, KalmForRollouts

ROWS = {
    "input_ids": torch.zeros(4, 64, dtype=torch.long),
    "modality": torch.full((4, 64), 1),
    "predict": torch.ones(4, 64, dtype=torch.bool),
}


def config(lora_rank=0, layers=4):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    backbone = transformers.LlamaConfig(vocab_size=500, num_hidden_layers=layers, **sizes)
    return KalmConfig(backbone_config=backbone, objects=5, lora_rank=lora_rank)


def parts(tmp_path, lora_rank=0, dtype=torch.float32, layers=4, **options):
    settings = grounding_settings(tmp_path, lora_rank=lora_rank, **options)
    return memory.of_grounding(config(lora_rank, layers), ROWS, settings, dtype)


def test_weights_and_optimizer_are_counted_to_the_byte(tmp_path):
    model = KalmForRollouts(config())
    words = model.get_input_embeddings().weight.numel()
    numbers = sum(parameter.numel() for parameter in model.parameters())
    found = parts(tmp_path)
    assert found["weights"] == 4 * numbers
    assert found["optimizer"] == 8 * (numbers - words)
    with_lora = KalmForRollouts(config(lora_rank=8))
    new = sum(p.numel() for p in with_lora.parameters() if p.requires_grad)
    old = sum(p.numel() for p in with_lora.parameters()) - new
    found = parts(tmp_path, 8, torch.bfloat16)
    assert found["weights"] == 4 * new + 2 * old and found["optimizer"] == 8 * new


def test_checkpoints_of_layers_and_fewer_layers_keep_less(tmp_path):
    kept = "activations or gradients"
    deep = parts(tmp_path, 8, layers=12)[kept]
    shallow = parts(tmp_path, 8, layers=6)[kept]
    checkpointed = parts(tmp_path, 8, layers=12, activation_checkpointing=True)[kept]
    assert checkpointed < shallow < 0.75 * deep


@pytest.mark.parametrize("where", ("device", "host"))
def test_out_of_memory_says_what_helps_and_the_run_goes_on(tmp_path, monkeypatch, capsys, where):
    step = ground.GroundingTrainer.training_step

    def full(self, *arguments, **options):
        if self.state.global_step < 5:
            return step(self, *arguments, **options)
        if where == "device":
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return torch.empty(2**60)  # bytes that no host has

    run = ("--scale", "smoke", "--output_dir", tmp_path, "--stage", "collect", "ground")
    with monkeypatch.context() as patch:
        patch.setattr(ground.GroundingTrainer, "training_step", full)
        assert kalm.main(run) == 2
    said = capsys.readouterr().err
    assert "stage 'ground': out of memory" in said and "--activation_checkpointing true" in said
    steps = []
    noted = lambda self, *rest: (steps.append(self.state.global_step), step(self, *rest))[1]
    monkeypatch.setattr(ground.GroundingTrainer, "training_step", noted)
    assert kalm.main(run) == 0
    assert steps == [4, 5, 6, 7]  # the checkpoint was at 4


def test_a_checkpoint_with_lora_holds_what_was_trained_and_its_optimizer(tmp_path, monkeypatch):
    step = ground.GroundingTrainer.training_step

    def stopping(self, *arguments, **options):
        if self.state.global_step == 5:
            raise OSError("the power went")
        return step(self, *arguments, **options)

    monkeypatch.setattr(ground.GroundingTrainer, "training_step", stopping)
    run = ("--scale", "smoke", "--output_dir", tmp_path, "--stage", "collect", "ground")
    assert kalm.main([*run, "--lora_rank", "64"]) == 2
    (checkpoint,) = tmp_path.rglob("checkpoint-*")
    trained = sum(weight.nbytes for weight in load_file(checkpoint / "model.safetensors").values())
    files = [file for file in checkpoint.iterdir() if file.suffix != ".json"]  # settings, tokenizer
    size = sum(file.stat().st_size for file in files)
    assert 3 * trained <= size < 1.1 * 3 * trained  # AdamW has two more numbers for each


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("width, layers", [(256, 6), (512, 8)])
def test_the_estimate_is_near_what_grounding_takes(tmp_path, width, layers):
    # What the estimate counts is tensors. glibc would keep some of what was freed, for later.
    gives_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
    for lora_rank in (0, 32):
        options = ("--lora_rank", lora_rank)
        script = [sys.executable, ROOT / "tests" / "peak_memory.py", tmp_path, width, layers]
        command = [*map(str, (*script, *options, "--per_device_train_batch_size", 12))]
        output = {"capture_output": True, "encoding": "utf-8"}
        done = subprocess.run(command, **output, timeout=600, env=gives_back)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.rpartition("FOUND")[2])
        assert found["estimate"] == pytest.approx(found["measured"], rel=0.15), found
