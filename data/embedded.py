"""What the prepare.py of the embedded tasks share: problems as a file, and the folders of a pair of small models to be
trained from scratch, with a tokenizer of the task's notation."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from data.checkpoint import write_config


def write_jsonl(path: Path, rows: list[dict]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.with_suffix(".incomplete").write_text(text, encoding="utf-8", newline="\n")
    path.with_suffix(".incomplete").replace(path)
    print(f"{path.name}: {len(rows):,} rows, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}")


def write_pair(
    folder: Path, pattern: str, texts: Iterable[str], rope_theta: float, teacher: int = 128, student: int = 96,
    layers: int = 4, kv_heads: int = 2,
) -> None:
    """Train a byte-level BPE on `texts`, cut into pieces by the regular expression `pattern`, and write it with the two
    models' configurations into teacher/ and student/ of `folder`. Any other text has an encoding too. teacher, student:
    their widths."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1000,  # more than such texts have merges to offer
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
    ))
    vocab_size = 64 * -(-tokenizer.get_vocab_size() // 64)  # padded, as real checkpoints are
    print(f"tokenizer: {tokenizer.get_vocab_size()} tokens, padded to {vocab_size}")
    stop, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    for name, width in (("teacher", teacher), ("student", student)):
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=8192
        ).save_pretrained(folder / name)
        file = folder / name / "tokenizer_config.json"
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that older versions of transformers know too
        file.write_text(json.dumps(settings, indent=2), encoding="utf-8", newline="\n")
        write_config(Qwen3Config(
            vocab_size=vocab_size, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=kv_heads, head_dim=32, max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": rope_theta}, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=stop, pad_token_id=pad,
        ), folder / name, "float32")
        GenerationConfig(eos_token_id=stop, pad_token_id=pad).save_pretrained(folder / name)
