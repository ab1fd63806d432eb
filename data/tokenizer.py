"""Text to ids and back, and prompts as a checkpoint's chat template writes them.

The ids are those of the checkpoint's tokenizer.json. tiktoken finds them soonest, and is a byte-level BPE and nothing
else, which is all that Qwen, Llama 3, SmolLM2 and GPT-2 need; what it would do otherwise, the tokenizers library does.
Chat templates are rendered by transformers, in its sandbox, every prompt by itself.
"""

import functools
import json
import os
import re
import unicodedata
from datetime import datetime
from pathlib import Path

import tokenizers

from data import InputError, read_json, read_text, reading
from data.bpe import build_encoding, byte_alphabet

SIDE_FILES = (  # what a checkpoint folder holds besides its configuration and weights, copied along on saving
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "generation_config.json", "chat_template.jinja", "tokenizer.model",
)
JSON_FILES = (  # those of which something is read here; of two tokens that end a text the last one counts
    "generation_config.json", "config.json", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json",
)
told = set()  # folders of which it has been said that tiktoken does not serve them


class Clock(datetime):
    """The time that chat templates see: one moment for a run, though it lasts past midnight and is resumed later."""

    moment = datetime.now()

    @classmethod
    def now(cls, tz=None) -> datetime:
        return cls.moment


class Tokenizer:
    """Tokenizer of a checkpoint folder.

    vocab_size: number of real ids, which may be smaller than the model's padded head. stop_ids: every id that the
    folder's files declare as the end of a response, ascending. eos_id: the one of them that written text ends with.
    special: ids of the added tokens by their text; plain: those of them that are recognised in any text (<think>).
    chat: auto renders prompts through the chat template where there is one, on demands it, off ignores it.
    system: text of a system turn before the prompt. thinking: on or off, for templates that have the switch.
    Raises InputError when the folder holds no readable tokenizer, or its template cannot do what is asked.
    """

    def __init__(self, folder: str | Path, chat: str = "auto", system: str = "", thinking: str = ""):
        self.folder, self.chat, self.system, self.thinking = Path(folder), chat, system, thinking
        file = self.folder / "tokenizer.json"
        if not file.is_file():
            raise InputError(f"{self.folder}: no tokenizer.json there")
        self.files = {name: (self.folder / name).read_bytes() for name in SIDE_FILES if (self.folder / name).is_file()}
        self.side = {name: read_json(self.folder / name) for name in JSON_FILES if (self.folder / name).is_file()}
        spec = read_json(file)
        with reading(file):
            self.raw = tokenizers.Tokenizer.from_file(str(file))
            self.raw.no_truncation(), self.raw.no_padding()
        with reading(self.folder):
            self.check_chat()
            self.add_declared_tokens()
            added = self.raw.get_added_tokens_decoder()
            self.special = {token.content: i for i, token in added.items()}
            self.plain = {token.content for token in added.values() if not token.special}
            names = sorted(self.special.keys() - self.plain, key=len, reverse=True)
            self.marks = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")
            self.tokens = {i: token for token, i in self.raw.get_vocab().items()}
            self.vocab_size, self.alphabet = 1 + max(self.tokens), byte_alphabet()
            bare, opened = (self.hf("a", add_special_tokens=special).input_ids for special in (False, True))
            self.bos_ids = next(opened[:i] for i in range(len(opened)) if opened[i : i + len(bare)] == bare)
            self.nfc = (spec.get("normalizer") or {}).get("type") == "NFC"
            self.unknown_bytes = {b for c, b in self.alphabet.items() if self.raw.token_to_id(c) is None}
            self.encoding, reason = build_encoding(spec, added)
            if reason and self.folder.resolve() not in told:
                told.add(self.folder.resolve())
                print(f"{self.folder}: {reason}, so it is not served by tiktoken but by tokenizers (slower)")
        self.stop_ids, self.eos_id = self.find_stop_ids()

    @functools.cached_property
    def hf(self):
        """The transformers tokenizer. It renders prompts and knows which tokens all the files together add."""
        from transformers import AutoTokenizer
        from transformers.utils import chat_template_utils

        chat_template_utils.datetime = Clock  # what a template's strftime_now asks
        with reading(self.folder):
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)

    def add_declared_tokens(self) -> None:
        """Give `raw` the tokens that only the files beside tokenizer.json add, such as added_tokens.json."""
        known = {repr(token) for token in self.raw.get_added_tokens_decoder().values()}
        self.raw.add_tokens([t for _, t in sorted(self.hf.added_tokens_decoder.items()) if repr(t) not in known])
        declared = self.side.get("tokenizer_config.json", {}).get("added_tokens_decoder") or {}
        ids = {token["content"]: int(i) for i, token in declared.items()} | self.side.get("added_tokens.json", {})
        for token, i in ids.items():
            if (found := self.raw.token_to_id(token)) != i:
                raise InputError(f"{self.folder}: the added token {token!r} is declared with the id {i}, but its "
                                 f"tokenizer.json and transformers make it {found}")

    def find_stop_ids(self) -> tuple[tuple[int, ...], int]:
        """All declared stop ids, and the one to end a written text with: the tokenizer's own, else the lowest."""
        found, own = set(), None
        for name, config in self.side.items():
            with reading(self.folder / name):
                ids, token = config.get("eos_token_id"), config.get("eos_token")
                found |= {int(i) for i in (ids if isinstance(ids, list) else [] if ids is None else [ids])}
                token = token["content"] if isinstance(token, dict) else token
                if token is not None and (i := self.raw.token_to_id(token)) is not None:
                    found.add(own := i)
        stop_ids = tuple(sorted(i for i in found if 0 <= i < self.vocab_size))
        if not stop_ids:
            raise InputError(f"{self.folder}: none of its files declares an end-of-sequence token that it has")
        return stop_ids, stop_ids[0] if own is None else own

    def check_ids(self, ids: list[int], vocab: int, where: str) -> None:
        """Raise InputError, which `where` opens, where an id lies beyond the `vocab` that both models know."""
        if (unknown := max(ids, default=0)) >= vocab:
            raise InputError(f"{where}: its token {unknown} {self.decode([unknown])!r} lies beyond the {vocab} that "
                             "the models know")

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text. Text that spells a special token becomes one only with `special`; added tokens that are not
        special, such as Qwen3's <think>, always do, as in transformers."""
        text = text.encode("utf-8", "replace").decode()  # a lone half of a surrogate pair is no character
        if (self.encoding is None or (self.nfc and not unicodedata.is_normalized("NFC", text))
                or (self.unknown_bytes and self.unknown_bytes & set(text.encode()))):
            self.raw.encode_special_tokens = not special
            return self.raw.encode(text, add_special_tokens=False).ids
        return self.encoding.encode(text, allowed_special="all" if special else self.plain, disallowed_special=())

    def decode(self, ids: list[int]) -> str:
        """Text of some ids, special tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
        if self.encoding is None:
            return self.raw.decode(ids, skip_special_tokens=False)
        return self.encoding.decode([i for i in ids if i in self.tokens])

    def token_bytes(self, i: int) -> bytes:
        """The bytes that id i stands for (empty where the vocabulary has a gap), to compare two tokenizers."""
        token = self.tokens.get(i, "")
        if token in self.special or not all(c in self.alphabet for c in token):
            return token.encode("utf-8", "surrogatepass")
        return bytes(self.alphabet[c] for c in token)

    def encode_prompt(self, prompt: str) -> list[int]:
        """A prompt as the model expects it: through the chat template where the checkpoint has one, else as it is, but
        for the token that opens every text if the tokenizer has one.

        Special tokens are recognised in the template's own text only; in the user's prompt they stay text.
        """
        if not self.chats():
            return self.bos_ids + self.encode(prompt)
        spelled = set(self.marks.findall(prompt))
        if not spelled:
            return self.encode(self.render(prompt), special=True)
        # While the template is at work, a character that occurs nowhere stands for each special token of the prompt.
        used = {*prompt, *self.system, *self.chat_template()}
        unused = (chr(c) for c in range(0xE000, 0xF900) if chr(c) not in used)
        stand_in = dict(zip(spelled, unused))
        meant = {c: token for token, c in stand_in.items()}
        ids, rest = [], ""
        for piece in self.marks.split(self.render(self.marks.sub(lambda m: stand_in[m[0]], prompt))):
            if meant.keys() & set(piece):
                piece = "".join(meant.get(c, c) for c in piece)
                ids, rest = ids + self.encode(rest, special=True) + self.encode(piece), ""
            else:
                rest += piece
        return ids + self.encode(rest, special=True)

    def render(self, prompt: str, tokenize: bool = False) -> str | list[int]:
        """What transformers makes of a prompt with the chat template: a text, or ids."""
        turns = [("system", self.system)] * bool(self.system) + [("user", prompt)]
        options = {"enable_thinking": self.thinking == "on"} if self.thinking else {}
        try:
            return self.hf.apply_chat_template(
                [{"role": role, "content": text} for role, text in turns], chat_template=self.chat_template(),
                add_generation_prompt=True, tokenize=tokenize, return_dict=False, **options)
        except Exception as error:  # noqa: BLE001 (a template may raise anything)
            raise InputError(f"{self.folder}: its chat template fails ({type(error).__name__}: {error})") from None

    def surroundings(self) -> dict:
        """What a run puts its prompts into, to be stored with it: a short prompt's ids, the time its template saw."""
        return {"ids": self.encode_prompt("?"), "clock": Clock.moment.isoformat()}

    def chats(self) -> bool:
        return self.chat != "off" and self.chat_template() is not None

    @functools.cache  # noqa: B019
    def chat_template(self) -> str | None:
        """The text of the checkpoint's default chat template."""
        file = self.folder / "chat_template.jinja"
        found = read_text(file) if file.is_file() else self.side.get("tokenizer_config.json", {}).get("chat_template")
        if isinstance(found, list):  # several, by name
            found = {template["name"]: template["template"] for template in found}.get("default")
        return found or None

    def check_chat(self) -> None:
        template = self.chat_template()
        if self.chat not in ("auto", "on", "off"):
            raise InputError(f"--chat {self.chat}: expected one of auto, on, off")
        if self.chat == "on" and template is None:
            raise InputError(f"--chat on: {self.folder} has no chat template")
        if self.thinking and "enable_thinking" not in (template or ""):
            raise InputError(f"--thinking {self.thinking}: the chat template of {self.folder} has no such switch")
        if self.system and not self.chats():
            raise InputError(f"--system: {self.folder} renders prompts without a chat template that could hold it")

    def stop_ids_of(self, names: str) -> tuple[int, ...]:
        """Ids of --stop_tokens, a comma-separated list of special tokens or ids."""
        found = []
        for name in filter(None, (n.strip() for n in names.split(","))):
            i = self.special.get(name, int(name) if re.fullmatch(r"\d{1,9}", name) else -1)
            if not 0 <= i < self.vocab_size:
                raise InputError(f"--stop_tokens {name}: neither a special token of {self.folder} nor one of its ids")
            found.append(i)
        return tuple(found)

    def save(self, folder: str | Path, stop_ids: tuple[int, ...] = ()) -> None:
        """Write the tokenizer's and the generation settings' files, as they were when read, to another folder.
        stop_ids, if given, are what the model there was trained to stop with: whoever serves it must know."""
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)
        if stop_ids:
            settings = self.side.get("generation_config.json", {}) | {"eos_token_id": list(stop_ids)}
            (Path(folder) / "generation_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def check_same(student: Tokenizer, teacher: Tokenizer) -> None:
    """Raise InputError naming the first id that does not stand for the same bytes in both.

    Distillation compares the two models id by id; a longer vocabulary on one side is fine, another meaning is not.
    """
    for i in range(min(student.vocab_size, teacher.vocab_size)):
        if (ours := student.token_bytes(i)) != (other := teacher.token_bytes(i)):
            raise InputError(f"student and teacher have different tokenizers: id {i} is {ours!r} in {student.folder} "
                             f"and {other!r} in {teacher.folder}. Choose a pair of one family")


def check_rendering(tokenizer: Tokenizer, prompts: list[str]) -> None:
    """Raise InputError for the first prompt whose ids are not those of transformers. A prompt that spells a special
    token is left out: it stays text here."""
    import transformers

    for prompt in prompts:
        ours = tokenizer.encode_prompt(prompt)
        expected = tokenizer.render(prompt, tokenize=True) if tokenizer.chats() else tokenizer.hf(prompt).input_ids
        if set(expected[len(ours) :]) <= set(tokenizer.stop_ids):  # an end that some tokenizers put after every text
            expected = expected[: len(ours)]
        if ours != expected and not tokenizer.marks.search(prompt):
            at = len(os.path.commonprefix([ours, expected]))
            raise InputError(
                f"{tokenizer.folder}: from token {at} on, {prompt[:50]!r} has ids {ours[at:][:5]} by tokenizer.json "
                f"and {expected[at:][:5]} by transformers {transformers.__version__}. Another version of it may agree, "
                'as may this one with "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json')


def resume_clock(state: dict) -> None:
    """Let chat templates see the time that they saw in the run whose state.json this is."""
    if moment := state.get("inputs", {}).get("surroundings of prompts", {}).get("clock"):
        Clock.moment = datetime.fromisoformat(moment)


def as_trained(config, folder: Path) -> None:
    """Give `config` the data and prompt flags of the run that wrote a checkpoint, where they were not typed, and
    templates its time: a student must be prompted as in its training."""
    file, said = folder / "state.json", []
    state = read_json(file) if file.is_file() else {}
    with reading(file):
        trained = state.get("config", {})
        trained["data"] = trained.get("eval_data") or trained.get("data", "hops")  # the held-out one first
        resume_clock(state)
    defaults = {"data": "hops", "chat": "auto", "system": "", "thinking": "", "teacher_prompt": ""}
    for name, default in defaults.items():
        value = trained.get(name, default)
        if name not in config.typed and value not in (default, getattr(config, name, value)):
            setattr(config, name, value)
            own = name == "data" and not trained.get("eval_data") and Path(value).is_file()
            said.append(f"--{name} {value}" + " (what it was trained on: it had no --eval_data)" * own)
    if said:
        print(f"as in its training: {' '.join(said)}")
