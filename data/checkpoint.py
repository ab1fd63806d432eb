"""Which checkpoint folders and configurations are accepted."""

import difflib
import os
import reprlib
from pathlib import Path

from data import HERE, InputError, read_json


def head_dim_of(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


SIZES = {  # the numbers of config.json that say how large a model is, and the largest that are accepted
    "num_hidden_layers": 1000, "hidden_size": 2**17, "intermediate_size": 2**20, "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12, "head_dim": 2**12, "vocab_size": 2**24, "max_position_embeddings": 2**31,
}


def check_sizes(fields: dict) -> None:
    """Refuse other kinds of models, and sizes that no model has: building one of 10^9 layers would take for ever."""
    if fields.get("model_type") not in ("llama", "qwen2", "qwen3"):
        kind = reprlib.repr(fields.get("model_type"))
        raise InputError(f"model_type {kind} is not supported (llama, qwen2 and qwen3 are)")
    for name, most in SIZES.items():
        size = fields.get(name)
        if size is not None and not (type(size) is int and 1 <= size <= most):
            raise InputError(f"{name} must be a whole number from 1 to {most:,}, found {reprlib.repr(size)}")


def check_config(config) -> None:
    """Refuse by name what the code above does not do, rather than compute something else."""
    check_sizes({name: getattr(config, name, None) for name in ("model_type", *SIZES)})
    if head_dim_of(config) % 2 or not head_dim_of(config):
        raise InputError(f"head_dim must be even for the rotary embedding, found {head_dim_of(config)}")
    if config.num_attention_heads % config.num_key_value_heads:
        raise InputError(f"num_attention_heads {config.num_attention_heads} must be a multiple of num_key_value_heads "
                         f"{config.num_key_value_heads}")
    if not 0 < config.rms_norm_eps < 1:
        raise InputError(f"rms_norm_eps must lie between 0 and 1, found {config.rms_norm_eps}")
    rope = config.rope_parameters or {}
    needed = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
              "yarn": ("factor",)}
    optional = ("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale",
                "mscale_all_dim")
    kind = rope.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in needed:
        raise InputError(f"rope_type {reprlib.repr(kind)} is not supported ({', '.join(needed)} are)")
    for key in ("rope_theta", *needed[kind], *(key for key in optional if rope.get(key) is not None)):
        number, least = rope.get(key), 1 if key == "rope_theta" else 1e-9
        if not (type(number) in (int, float) and least < number < 1e15):
            raise InputError(f"rope_type {kind!r} needs a number {key!r} above {least} and below 1e15 in the "
                             f"configuration, found {reprlib.repr(number)}")
    if kind == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise InputError("low_freq_factor must be below high_freq_factor")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError("partial_rotary_factor is not supported")
    if config.hidden_act != "silu":
        raise InputError(f"hidden_act {config.hidden_act!r} is not supported (silu is)")
    if getattr(config, "use_sliding_window", False) or "sliding_attention" in (
        getattr(config, "layer_types", None) or ()
    ):
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
        raise InputError(
            f"{path}: not a local folder, and the hub did not give it ({reason}). Without a network, give "
            f"the folder of a local copy{hint}"
        ) from None


def load_config(folder: str | Path):
    """The transformers configuration of a checkpoint folder. Raises InputError naming config.json and what is wrong."""
    from transformers import AutoConfig

    file = Path(folder) / "config.json"
    if not file.is_file():
        raise InputError(f"{folder}: no config.json there, so it is not a checkpoint folder")
    fields = read_json(file)
    try:
        check_sizes(fields)  # before transformers makes a list of all layers
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        for name in fields:  # transformers would let one replace a method, such as save_pretrained
            if callable(getattr(type(config), name, None)):
                raise InputError(f"it has a field named {name}")
        check_config(config)
        return config
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except Exception as error:  # noqa: BLE001 (transformers raises whatever a field of a wrong kind leads to)
        raise InputError(f"{file}: not a configuration ({type(error).__name__}: {error})") from None


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        files = [single]
    else:
        files = sorted({folder / name for name in read_json(index)["weight_map"].values()})
    for file in files:
        if not file.is_file():
            raise InputError(f"{folder}: no {file.name} there (weights are read from safetensors only)")
    return files
