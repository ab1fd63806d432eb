"""Text to ids and back: a tiktoken encoding built from the tokenizer.json of a Hugging Face checkpoint.

tiktoken is a byte-level BPE and nothing else, which is all that Qwen, Llama 3, SmolLM2 and GPT-2 need. A tokenizer of
another kind is served by transformers, and says so. Chat templates are rendered by transformers.
"""

import functools
import json
import re
import shutil
import unicodedata
from pathlib import Path

import tiktoken
from jinja2 import TemplateError

from data import InputError, read_json

SIDE_FILES = (  # what a checkpoint folder holds besides its configuration and weights, copied along on saving
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
    "tokenizer.model",
)


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for every byte, as used in tokenizer.json: character -> byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def split_pattern(pre_tokenizer: dict) -> str | None:
    """The regular expression that cuts a text into the pieces that are encoded one by one, or None if it is not
    known."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step.get("type") for step in steps]
    if kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    own_pattern = steps[-1].get("use_regex", True)  # ByteLevel's own pattern is GPT-2's
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    if kinds == ["ByteLevel"] and own_pattern:  # GPT-2
        return gpt2
    if kinds == ["Digits", "ByteLevel"] and own_pattern and steps[0].get("individual_digits"):  # SmolLM2
        # Digits are cut out first, so white space before a digit is the end of a piece.
        return gpt2.replace(r" ?\p{N}+", r"\p{N}").replace(r"\s+(?!\S)", r"\s+(?=\p{N})|\s+(?!\S)")
    if kinds == ["Split", "ByteLevel"] and not own_pattern and steps[0].get("behavior") == "Isolated":  # Qwen, Llama 3
        return steps[0]["pattern"].get("Regex")
    return None


def opening_ids(post_processor: dict) -> list[int]:
    """Ids that the tokenizer puts before every text (Llama 3's <|begin_of_text|>), from tokenizer.json."""
    for step in post_processor.get("processors", [post_processor]):
        if step.get("type") == "TemplateProcessing":
            names = [piece["SpecialToken"]["id"] if "SpecialToken" in piece else None for piece in step["single"]]
            return [i for name in names[: names.index(None)] for i in step["special_tokens"][name]["ids"]]
    return []


class Tokenizer:
    """Tokenizer of a checkpoint folder.

    vocab_size: number of real ids, which may be smaller than the model's padded head. stop_ids: every id that the
    folder's files declare as the end of a response, ascending. eos_id: the one of them that written text ends with.
    chat: auto renders prompts through the chat template where there is one, on demands it, off ignores it.
    system: text of a system turn before the prompt. thinking: on or off, for templates that have the switch.
    Raises InputError when the folder holds no readable tokenizer, or its template cannot do what is asked.
    """

    def __init__(self, folder: str | Path, chat: str = "auto", system: str = "", thinking: str = ""):
        self.folder, self.chat, self.system, self.thinking = Path(folder), chat, system, thinking
        file = self.folder / "tokenizer.json"
        if not file.is_file():
            raise InputError(f"{self.folder}: no tokenizer.json there")
        spec = read_json(file)
        try:
            vocab = spec["model"]["vocab"]
            if isinstance(vocab, list):  # Unigram: [token, score] pairs
                vocab = {token: i for i, (token, _) in enumerate(vocab)}
            self.special = {t["content"]: t["id"] for t in spec.get("added_tokens", [])}
            self.plain = {t["content"] for t in spec.get("added_tokens", []) if not t.get("special")}  # such as <think>
            self.bos_ids = opening_ids(spec.get("post_processor") or {})
            merges = spec["model"].get("merges", [])
            self.merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in merges]
            missing = next((a + b for a, b in self.merges if a + b not in vocab), None)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{file}: not a tokenizer this can read ({error!r})") from None
        if missing is not None:
            raise InputError(f"{file}: the merge that gives {missing!r} has no id")
        self.vocab_size = 1 + max([*vocab.values(), *self.special.values()])
        self.tokens = {i: token for token, i in (vocab | self.special).items()}
        self.alphabet = byte_alphabet()
        self.nfc = (spec.get("normalizer") or {}).get("type") == "NFC"
        self.encoding = self.build_encoding(spec)
        self.hf = None  # the transformers tokenizer, loaded when something needs it
        if self.encoding is None:
            print(f"{self.folder}: the tokenizer is not a plain byte-level BPE, so transformers encodes (slower)")
        self.stop_ids, self.eos_id = self.find_stop_ids()
        self.check_chat()

    def build_encoding(self, spec: dict) -> tiktoken.Encoding | None:
        """The same BPE as a tiktoken.Encoding, or None where tiktoken cannot be the same."""
        normalizer = (spec.get("normalizer") or {}).get("type")
        pattern = split_pattern(spec.get("pre_tokenizer") or {})
        if spec["model"].get("type") != "BPE" or spec["model"].get("byte_fallback") or normalizer not in (None, "NFC"):
            return None
        vocab = {t: i for t, i in spec["model"]["vocab"].items() if t not in self.special}
        if pattern is None or not all(c in self.alphabet for token in vocab for c in token):
            return None
        ranks = {bytes(self.alphabet[c] for c in token): i for token, i in vocab.items()}
        # tiktoken applies the merge whose result has the lowest id; Hugging Face the merge that is listed first.
        ids = [vocab.get(a + b, -1) for a, b in self.merges]
        if ids != sorted(set(ids)):
            return None
        # Some tokenizers (SmolLM2's) know no token for some rare bytes, and skip them. tiktoken wants one for each, so
        # they get ids that nobody uses; a text that has such a byte is left to transformers.
        self.unknown_bytes = bytes(b for b in range(256) if bytes([b]) not in ranks)
        ranks |= {bytes([b]): 2**30 + b for b in self.unknown_bytes}
        return tiktoken.Encoding(self.folder.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special)

    def transformers(self):
        if self.hf is None:
            from transformers import AutoTokenizer

            self.hf = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        return self.hf

    def find_stop_ids(self) -> tuple[tuple[int, ...], int]:
        """All declared stop ids, and the one to end a written text with: the tokenizer's own, else the lowest."""
        found, own = set(), None
        for name in ("generation_config.json", "config.json", "tokenizer_config.json"):
            file = self.folder / name
            if not file.is_file():
                continue
            config = read_json(file)
            eos = config.get("eos_token_id")
            found.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
            token = config.get("eos_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token in self.special:
                found.add(own := self.special[token])
        if not found:
            raise InputError(f"{self.folder}: none of its files declares an end-of-sequence token")
        stop_ids = tuple(sorted(i for i in found if i < self.vocab_size))
        if not stop_ids:
            raise InputError(f"{self.folder}: the end-of-sequence ids {sorted(found)} lie beyond its {self.vocab_size}")
        return stop_ids, stop_ids[0] if own is None else own

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text. Text that spells a special token becomes one only with `special`; added tokens that are not
        special, such as Qwen3's <think>, always do, as in transformers."""
        text = text.encode("utf-8", "replace").decode()  # a lone half of a surrogate pair is no character
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        if self.encoding is None or (self.unknown_bytes and set(text.encode()) & set(self.unknown_bytes)):
            return self.transformers().encode(text, add_special_tokens=False, split_special_tokens=not special)
        return self.encoding.encode(text, allowed_special="all" if special else self.plain, disallowed_special=())

    def decode(self, ids: list[int]) -> str:
        """Text of some ids, special tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
        if self.encoding is None:
            return self.transformers().decode(ids)
        return self.encoding.decode([i for i in ids if i < self.vocab_size])

    def token_bytes(self, i: int) -> bytes:
        """The bytes that id i stands for (empty where the vocabulary has a gap), to compare two tokenizers."""
        token = self.tokens.get(i, "")
        if token in self.special or not all(c in self.alphabet for c in token):
            return token.encode()
        return bytes(self.alphabet[c] for c in token)

    def encode_prompt(self, prompt: str) -> list[int]:
        """A prompt as the model expects it: through the chat template where the checkpoint has one, else as it is, but
        for the token that opens every text if the tokenizer has one.

        Special tokens are recognised in the template's own text only; in the user's prompt they stay text.
        """
        if not self.chats():
            return self.bos_ids + self.encode(prompt)
        before, after = self.template_around(" \ue000 ")
        if before is None:  # the template strips the message, as Llama 3's does
            before, after = self.template_around("\ue000")
            prompt = prompt.strip()
        if before is None:
            raise InputError(f"{self.folder}: its chat template does not contain the user's message as it is")
        # Special tokens cut the text, so what touches the prompt up to the nearest of them is encoded together with it.
        marks = re.compile("|".join(re.escape(t) for t in sorted(self.special, key=len, reverse=True)) or r"(?!)")
        start = max((m.end() for m in marks.finditer(before)), default=0)
        end = min((m.start() for m in marks.finditer(after)), default=len(after))
        middle = self.encode(before[start:] + prompt + after[:end])
        return self.encode(before[:start], special=True) + middle + self.encode(after[end:], special=True)

    def template_around(self, message: str) -> tuple[str, str] | tuple[None, None]:
        """What the chat template writes before and after a user's message, or Nones if the message is not in there
        once."""
        turns = [{"role": "system", "content": self.system}] if self.system else []
        turns.append({"role": "user", "content": message})
        switch = {"enable_thinking": self.thinking == "on"} if self.thinking else {}
        try:
            rendered = self.transformers().apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, **switch
            )
        except TemplateError as error:  # from the template's own raise_exception, or it is no valid template
            raise InputError(f"{self.folder}: its chat template cannot be used here ({error})") from None
        before, found, after = rendered.partition(message)
        return (before, after) if found and message not in after else (None, None)

    def chats(self) -> bool:
        return self.chat != "off" and self.chat_template() is not None

    @functools.cache  # noqa: B019 (a few tokenizers a process)
    def chat_template(self) -> str | None:
        """The text of the checkpoint's default chat template."""
        file = self.folder / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        file = self.folder / "tokenizer_config.json"
        found = read_json(file).get("chat_template") if file.is_file() else None
        if isinstance(found, list):  # several, by name
            found = {entry.get("name"): entry.get("template") for entry in found}.get("default")
        return found or None

    def check_chat(self) -> None:
        for name, value, allowed in (
            ("chat", self.chat, ("auto", "on", "off")),
            ("thinking", self.thinking, ("", "on", "off")),
        ):
            if value not in allowed:
                raise InputError(f"--{name} {value}: expected one of {', '.join(filter(None, allowed))}")
        if self.chat == "on" and self.chat_template() is None:
            raise InputError(f"--chat on: {self.folder} has no chat template")
        if self.thinking and "enable_thinking" not in (self.chat_template() or ""):
            raise InputError(f"--thinking {self.thinking}: the chat template of {self.folder} has no such switch")
        if self.system and not self.chats():
            raise InputError(
                f"--system: {self.folder} renders prompts without a chat template, so there is no system turn"
            )

    def stop_ids_of(self, names: str) -> tuple[int, ...]:
        """Ids of --stop_tokens, a comma-separated list of special tokens or ids."""
        found = []
        for name in filter(None, (n.strip() for n in names.split(","))):
            i = self.special.get(name, int(name) if name.isdigit() else -1)
            if not 0 <= i < self.vocab_size:
                raise InputError(f"--stop_tokens {name}: neither a special token of {self.folder} nor one of its ids")
            found.append(i)
        return tuple(found)

    def save(self, folder: str | Path, stop_ids: tuple[int, ...] = ()) -> None:
        """Copy the tokenizer's and the generation settings' files to another checkpoint folder. stop_ids, if given, are
        what the model there was trained to stop with: whoever serves it must know."""
        if not (self.folder / "tokenizer.json").is_file():
            raise InputError(f"{self.folder}: its tokenizer.json is gone")
        for name in SIDE_FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, Path(folder) / name)
        if stop_ids:
            file = Path(folder) / "generation_config.json"
            settings = read_json(file) if file.is_file() else {}
            file.write_text(json.dumps(settings | {"eos_token_id": list(stop_ids)}, indent=1) + "\n")


def check_same(student: Tokenizer, teacher: Tokenizer) -> None:
    """Raise InputError naming the first id that does not stand for the same bytes in both.

    Distillation compares the two models id by id; a longer vocabulary on one side is fine, another meaning is not.
    """
    for i in range(min(student.vocab_size, teacher.vocab_size)):
        if (ours := student.token_bytes(i)) != (other := teacher.token_bytes(i)):
            raise InputError(
                f"student and teacher have different tokenizers: id {i} is {ours!r} in {student.folder} and {other!r} "
                f"in {teacher.folder}. Choose a pair of one family"
            )


def prompted_as_trained(config, folder: Path) -> None:
    """Give `config` the chat, system and thinking flags of the run that wrote a checkpoint, where they were not given:
    a student must be prompted as in its training."""
    file = folder / "state.json"
    trained, said = read_json(file).get("config", {}) if file.is_file() else {}, []
    for name, default in (("chat", "auto"), ("system", ""), ("thinking", "")):
        if name not in getattr(config, "typed", (name,)) and trained.get(name, default) != default:
            setattr(config, name, trained[name])
            said.append(f"--{name} {trained[name]}")
    if said:
        print(f"prompts as in its training: {' '.join(said)}")
