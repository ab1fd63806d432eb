"""Which checkpoint folders and configurations are accepted, which files hold the weights, and what a checkpoint of ours
says about itself. Needs no model."""

import difflib
import json
import os
from pathlib import Path

from data import HERE, InputError, read_json, reading


def head_dim_of(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


FAMILIES = ("llama", "qwen2", "qwen3")  # those that model.py computes


def check_config(config) -> None:
    """Refuse by name what model.py does not compute, rather than compute something else."""
    if config.model_type not in FAMILIES:
        raise InputError(f"model_type {config.model_type!r} is not supported ({', '.join(FAMILIES)} are), but for a "
                         "teacher that only scores: no --mix, --rollout teacher or --shard_teacher")
    rope = config.rope_parameters or {}
    needed = {"default": (), "linear": ("factor",), "yarn": ("factor",),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    kind = rope.get("rope_type", "default")
    if kind not in needed:
        raise InputError(f"rope_type {kind!r} is not supported ({', '.join(needed)} are)")
    for key in ("rope_theta", *needed[kind]):
        if not isinstance(rope.get(key), (int, float)):
            raise InputError(f"rope_type {kind!r} needs a number {key!r} in the configuration, found {rope.get(key)!r}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError("partial_rotary_factor is not supported")
    if getattr(config, "is_causal", None) is False:
        raise InputError("is_causal false, attention in both directions, is not supported")
    if config.hidden_act != "silu":
        raise InputError(f"hidden_act {config.hidden_act!r} is not supported (silu is)")
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if sliding or getattr(config, "use_sliding_window", False):
        raise InputError("sliding-window attention is not supported")


def checkpoint_folder(path: str | Path, files: tuple[str, ...] = ("*.json", "*.safetensors", "*.jinja")) -> Path:
    """The local folder of a checkpoint given as a folder, or as the name of a repository on the Hugging Face hub, of
    which `files` are downloaded and cached."""
    folder = Path(path)
    if folder.is_dir():
        steps = sorted(folder.glob("step_*")) if (folder / "log.jsonl").is_file() else []
        if steps:
            raise InputError(f"{path} is a run's folder; its checkpoints are {', '.join(map(str, steps))}")
        return folder
    there = [str(f) for f in folder.parent.glob("*") if f.is_dir()]
    there += [os.path.relpath(f.parent) for f in HERE.glob("*/*/config.json")]
    near = difflib.get_close_matches(str(path), there, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise InputError(f"{path}: no such folder, and not the name of a hub repository (owner/name){hint}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=list(files)))
    except (OSError, ValueError) as error:  # offline, not found, gated, disk full: the hub's own first line says which
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{path}: not a local folder, and the hub did not give it ({reason}). Without a network, give "
                         f"the folder of a local copy{hint}") from None


def load_config(folder: str | Path, any_family: bool = False):
    """The transformers configuration of a checkpoint folder. any_family: also one that model.py does not compute, for a
    teacher. Raises InputError naming config.json and what is wrong."""
    from transformers import AutoConfig

    file = Path(folder) / "config.json"
    if not file.is_file():
        raise InputError(f"{folder}: no config.json there, so it is not a checkpoint folder")
    fields = read_json(file)
    with reading(file):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # what is not declared stays so: no defaults of
            setattr(config, name, fields.get(name))  # transformers, whose 2 is an ordinary token elsewhere
    if quantization := getattr(config, "quantization_config", None):
        raise InputError(f"{file}: quantization_config: quantized weights ({quantization.get('quant_method')}) are not "
                         "supported; give the checkpoint that they were made from")
    if config.model_type in FAMILIES or not any_family:
        try:
            check_config(config)
        except InputError as error:
            raise InputError(f"{file}: {error}") from None
    original = fields.get("original_max_position_embeddings")
    if original and (config.rope_parameters or {}).get("rope_type") in ("llama3", "yarn"):
        config.rope_parameters["original_max_position_embeddings"] = original  # this one counts in transformers, too
    return config


def weight_files(folder: str | Path) -> list[Path]:
    """The files that hold a checkpoint's weights, as transformers chooses them: model.safetensors where there is one,
    else those that the index names. Raises InputError where one of them is missing."""
    single, index = Path(folder) / "model.safetensors", Path(folder) / "model.safetensors.index.json"
    names = {single.name}
    if index.is_file() and not single.is_file():
        with reading(index):
            names = set(read_json(index)["weight_map"].values())
            if not names or any(Path(name).name != name for name in names):
                raise ValueError("expected the names of files beside it")
    files = sorted(Path(folder) / name for name in names)
    for file in files:
        if not file.is_file():
            raise InputError(f"{folder}: no {file.name} there (weights are read from safetensors only)")
    return files


def write_config(config, folder: str | Path, dtype) -> None:
    """Write config.json so that all its readers understand the same: transformers 5 reads `rope_parameters` and
    `dtype`; transformers 4 and what is built on it read `rope_theta`, `rope_scaling` and `torch_dtype`."""
    fields = config.to_diff_dict()
    scaling = dict(fields["rope_parameters"])
    fields["rope_theta"] = scaling.pop("rope_theta")
    fields["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    fields["dtype"] = fields["torch_dtype"] = str(dtype).removeprefix("torch.")
    fields["architectures"] = fields.get("architectures") or [f"{config.model_type.capitalize()}ForCausalLM"]
    (Path(folder) / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
