"""Several processes: grounding against one process, whole and sharded; shipped settings."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import ROOT, tiny_llm
from safetensors.torch import load_file

import ground

STEPS = "--scale smoke --stage collect ground --max_steps 5 --logging_steps 1 --save_steps 2"
STEPS += " --eval_strategy no --bf16 false"


def ground_in(run, *options, way=None, copy="", copy_at=0):
    """Five steps of grounding in a run's folder, on two processes or, without a way, one, which
    takes the batches of both together.
    """
    count = 2 if way else 1
    command = [sys.executable, ROOT / "tests" / "as_if_gpus.py", way or "ddp", copy_at, copy]
    command += [*STEPS.split(), "--per_device_train_batch_size", 8 // count]
    command += ["--output_dir", run, *options]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(count):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count}
        place |= {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
        place = {name: str(value) for name, value in place.items() if way}
        processes.append(
            subprocess.Popen(
                list(map(str, command)),
                env={**os.environ, **place},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                encoding="utf-8",
            )
        )
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, errors


def losses(run):
    """The loss of each step by modality."""
    entries = map(json.loads, (run / "logs" / "grounding.jsonl").read_text().splitlines())
    names = ("loss", "text_loss", "action_loss", "state_loss")
    return [[entry[name] for name in names] for entry in entries if "loss" in entry]


def weights(run):
    return load_file(run / "grounded" / "model.safetensors")


@pytest.fixture(scope="module")
def llms(world, tmp_path_factory):
    """Folders of tiny LLMs whose words' embeddings and output are one matrix, and two."""
    folders = {}
    for name in ("tied", "untied"):
        language_model, tokenizer = tiny_llm(world)
        config = language_model.config
        config.tie_word_embeddings = name == "tied"
        torch.manual_seed(3)
        folders[name] = tmp_path_factory.mktemp(name)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.mark.slow
@pytest.mark.parametrize(
    "way, embeddings, lora_rank",
    [("ddp", "untied", 4), ("fsdp", "tied", 0), ("sharded", "untied", 0), ("sharded", "tied", 4)],
)
def test_two_processes_train_as_one_and_go_on_after_a_kill(
    llms, tmp_path, way, embeddings, lora_rank
):
    options = ("--llm", llms[embeddings], "--lora_rank", lora_rank, "--keep_layers", 0)
    alone, whole, killed = tmp_path / "alone", tmp_path / "whole", tmp_path / "killed"
    ground_in(alone, *options)
    ground_in(whole, *options, way=way, copy=killed, copy_at=4)
    assert not (killed / "grounded").exists()
    ground_in(killed, *options, way=way)
    assert len(losses(alone)) == 5 and losses(alone)[0][0] > losses(alone)[-1][0]
    np.testing.assert_allclose(losses(whole), losses(alone), rtol=2e-3)
    assert losses(killed) == losses(whole)
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weight, weights(alone)[name], rtol=1e-3, atol=2e-4)
        torch.testing.assert_close(weights(killed)[name], weight, rtol=0, atol=0)


def test_deepspeed_trains_as_one_process_and_goes_on_after_a_kill(llms, tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    config = {**dict.fromkeys(auto, "auto"), "zero_optimization": {"stage": 2}}
    (tmp_path / "zero.json").write_text(json.dumps(config))
    options = ("--llm", llms["tied"], "--lora_rank", 0, "--keep_layers", 0)
    sharded = (*options, "--deepspeed", tmp_path / "zero.json")
    alone, whole, killed = tmp_path / "alone", tmp_path / "whole", tmp_path / "killed"
    ground_in(alone, *options)
    ground_in(whole, *sharded, way="ddp", copy=killed, copy_at=4)
    assert not (killed / "grounded").exists()
    ground_in(killed, *sharded, way="ddp")
    np.testing.assert_allclose(losses(whole), losses(alone), rtol=1e-3)
    assert losses(killed) == losses(whole)


def test_deepspeed_is_refused_where_it_is_missing_and_where_it_takes_weights_apart(
    tmp_path, monkeypatch
):
    path = tmp_path / "zero.json"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install deepspeed"):
        ground.check_deepspeed(str(path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for stage in (0, 1, 2):
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        ground.check_deepspeed(str(path))
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    with pytest.raises(ValueError, match="give stage 1 or 2 of ZeRO"):
        ground.check_deepspeed(str(path))


@pytest.mark.slow
def test_all_stages_pass_with_sharded_grounding(llms, tmp_path):
    options = ("--llm", llms["tied"], "--keep_layers", 0, "--stage", "all", "--bf16", "true")
    ground_in(tmp_path / "run", *options, way="fsdp")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["success"]["bc"]["offline"]["episodes"] == 12


@pytest.mark.parametrize("name, kind", [("ddp", "MULTI_GPU"), ("fsdp", "FSDP")])
def test_shipped_configurations_are_what_accelerate_takes(name, kind):
    path = ROOT / "configs" / f"{name}.yaml"
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert (config.distributed_type, config.mixed_precision) == (kind, "bf16")
    command = ["--config_file", str(path), "kalm.py", "--stage", "all"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(command))
    assert arguments.num_processes == config.num_processes > 1
    assert (arguments.use_fsdp, arguments.multi_gpu) == (kind == "FSDP", kind != "FSDP")
    if kind == "FSDP":
        known = {action.dest for action in launch_command_parser()._actions}
        given = yaml.safe_load(path.read_text("utf-8"))["fsdp_config"]
        assert set(given) <= known and arguments.fsdp_version in (2, "2")


def test_the_settings_for_one_small_card_ground_in_4_bits(llms, tmp_path):
    pytest.importorskip("bitsandbytes")
    settings = ("--config", ROOT / "configs" / "24gb.yaml")
    options = (*settings, "--llm", llms["untied"], "--bf16", "true")
    ground_in(tmp_path / "run", *options, "--keep_layers", 0, "--max_steps", 2)
    record = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]["ground"]
    settings = record["settings"]
    assert settings["load_in_4bit"] and settings["lora_rank"] == 64
    trained = sum(weight.nbytes for weight in weights(tmp_path / "run").values())
    file = tmp_path / "run" / "grounded" / "model.safetensors"
    assert trained < file.stat().st_size < 1.1 * trained
