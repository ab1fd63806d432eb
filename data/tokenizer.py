"""Text to ids and back: a tiktoken encoding built from the tokenizer.json of a Hugging Face checkpoint.

tiktoken is a byte-level BPE and nothing else, which is all that Qwen, Llama 3, SmolLM2 and GPT-2 need. A tokenizer of
another kind is served by transformers, and says so. Chat templates are rendered by transformers, in another process.
"""

import contextlib
import functools
import json
import math
import os
import re
import reprlib
import shutil
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import tiktoken

from data import HERE, InputError, read_json, read_text

SIDE_FILES = (  # what a checkpoint folder holds besides its configuration and weights, copied along on saving
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "generation_config.json", "chat_template.jinja", "tokenizer.model",
)


@contextlib.contextmanager
def one_error(folder: Path):
    """InputError for whatever libraries raise about a tokenizer's files; their Rust's panics are no Exceptions."""
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001
        raise InputError(f"{folder}: not a tokenizer this can read ({type(error).__name__}: {error})") from None


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
        with one_error(self.folder):
            spec = read_json(file)
            vocab, added = spec["model"]["vocab"], spec.get("added_tokens") or []
            if isinstance(vocab, list):  # Unigram: [token, score] pairs
                vocab = {token: i for i, (token, _) in enumerate(vocab)}
            self.special = {t["content"]: t["id"] for t in added}
            self.plain = {t["content"] for t in added if not t.get("special")}  # such as <think>
            self.bos_ids = opening_ids(spec.get("post_processor") or {})
            for i in (*vocab.values(), *self.special.values(), *self.bos_ids):
                if type(i) is not int or not 0 <= i < 2**24:
                    raise InputError(f"{file}: expected ids from 0 to 16,777,215, found {reprlib.repr(i)}")
            self.tokens = {i: token for token, i in (vocab | self.special).items()}
            self.vocab_size, self.alphabet = 1 + max(self.tokens), byte_alphabet()
            self.nfc = (spec.get("normalizer") or {}).get("type") == "NFC"
            self.encoding = self.build_encoding(spec, vocab)
            if self.encoding is None and self.hf:
                print(f"{self.folder}: the tokenizer is not a plain byte-level BPE, so transformers encodes (slower)")
        self.stop_ids, self.eos_id = self.find_stop_ids()
        self.check_chat()

    def build_encoding(self, spec: dict, vocab: dict[str, int]) -> tiktoken.Encoding | None:
        """The same BPE as a tiktoken.Encoding, or None where tiktoken cannot be the same."""
        model, normalizer = spec["model"], (spec.get("normalizer") or {}).get("type")
        if model.get("type") != "BPE" or model.get("byte_fallback") or normalizer not in (None, "NFC"):
            return None
        if any(t.get(o) for t in spec.get("added_tokens") or [] for o in ("lstrip", "rstrip", "single_word")):
            return None
        pattern = split_pattern(spec.get("pre_tokenizer") or {})
        vocab = {token: i for token, i in vocab.items() if token not in self.special}
        if not pattern or not all(c in self.alphabet for token in vocab for c in token):
            return None
        ranks = {bytes(self.alphabet[c] for c in token): i for token, i in vocab.items()}
        merges = [m if isinstance(m, list) else m.split(" ") for m in model.get("merges", [])]
        # tiktoken applies the merge whose result has the lowest id; Hugging Face the merge that is listed first.
        ids = [vocab.get(a + b, -1) for a, b in merges]
        if -1 in ids:
            raise InputError(f"{self.folder}: the merge {merges[ids.index(-1)]} in its tokenizer.json has no id")
        if ids != sorted(set(ids)):
            return None
        if len(self.tokens) < len(vocab) + len(self.special) or "" in self.special:  # two tokens of one id
            return None
        # Some tokenizers (SmolLM2's) know no token for some rare bytes, and skip them. tiktoken wants one for each, so
        # they get ids that nobody uses; a text that has such a byte is left to transformers.
        self.unknown_bytes = bytes(b for b in range(256) if bytes([b]) not in ranks)
        ranks |= {bytes([b]): 2**30 + b for b in self.unknown_bytes}
        found = tiktoken.Encoding(self.folder.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special)
        probe = "Is 2+3 five?\n\n\tIt's; 'no' would be wrong.\n"  # tiktoken leaves out what the pattern does not match
        return found if found.decode(found.encode(probe, disallowed_special=())) == probe else None

    @functools.cached_property
    def hf(self):
        """The transformers tokenizer, loaded when something needs it."""
        from transformers import AutoTokenizer

        with one_error(self.folder):
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)

    def find_stop_ids(self) -> tuple[tuple[int, ...], int]:
        """All declared stop ids, and the one to end a written text with: the tokenizer's own, else the lowest."""
        found, own = set(), None
        for name in ("generation_config.json", "config.json", "tokenizer_config.json"):
            file = self.folder / name
            config = read_json(file) if file.is_file() else {}
            ids, token = config.get("eos_token_id"), config.get("eos_token")
            ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
            token = token.get("content") if isinstance(token, dict) else token
            if any(type(i) is not int or i < 0 for i in ids) or not isinstance(token, (str, type(None))):
                raise InputError(f"{file}: expected eos_token_id to be ids and eos_token a text, found "
                                 f"{reprlib.repr(ids)} and {reprlib.repr(token)}")
            found.update(ids)
            if token in self.special:
                found.add(own := self.special[token])
        stop_ids = tuple(sorted(i for i in found if i < self.vocab_size))
        if not stop_ids:
            raise InputError(f"{self.folder}: none of its files declares an end-of-sequence token"
                             + (f" below its {self.vocab_size} ids, but {sorted(found)[:5]}" if found else ""))
        return stop_ids, stop_ids[0] if own is None else own

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text. Text that spells a special token becomes one only with `special`; added tokens that are not
        special, such as Qwen3's <think>, always do, as in transformers."""
        text = text.encode("utf-8", "replace").decode()  # a lone half of a surrogate pair is no character
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        with one_error(self.folder):
            if self.encoding is None or (self.unknown_bytes and set(text.encode()) & set(self.unknown_bytes)):
                return self.hf.encode(text, add_special_tokens=False, split_special_tokens=not special)
            return self.encoding.encode(text, allowed_special="all" if special else self.plain, disallowed_special=())

    def decode(self, ids: list[int]) -> str:
        """Text of some ids, special tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
        with one_error(self.folder):
            if self.encoding is None:
                return self.hf.decode(ids)
            return self.encoding.decode([i for i in ids if i < self.vocab_size])

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
        first, before, after, last, strips = self.around_prompt()
        return first + self.encode(before + (prompt.strip() if strips else prompt) + after) + last

    @functools.cache  # noqa: B019 (a few tokenizers a process)
    def around_prompt(self) -> tuple[list[int], str, str, list[int], bool]:
        """What the chat template writes around a user's message: ids, text, (the message,) text, ids; and whether it
        strips the message, as Llama 3's does. Special tokens cut the text: what touches the message up to the nearest
        of them is encoded together with it."""
        core = "\ue000 Aa <&>\n\"'\ue000"  # in no template; one that would change a prompt changes this as well
        turns = [{"role": "system", "content": self.system}] if self.system else []
        chats = [[*turns, {"role": "user", "content": message}] for message in (f" {core} ", core)]
        options = {"enable_thinking": self.thinking == "on"} if self.thinking else {}
        texts = render_elsewhere(self.folder, self.chat_template(), chats, self.hf.special_tokens_map | options)
        for chat, text in zip(chats, texts):
            before, found, after = text.partition(chat[-1]["content"])
            if found and core not in after:
                marks = "|".join(re.escape(t) for t in sorted(self.special, key=len, reverse=True)) or r"(?!)"
                start = max((m.end() for m in re.finditer(marks, before)), default=0)
                end = min((m.start() for m in re.finditer(marks, after)), default=len(after))
                first, last = (self.encode(part, special=True) for part in (before[:start], after[end:]))
                return first, before[start:], after[:end], last, chat is chats[1]
        raise InputError(f"{self.folder}: its chat template does not contain the user's message as it is")

    def chats(self) -> bool:
        return self.chat != "off" and self.chat_template() is not None

    @functools.cache  # noqa: B019
    def chat_template(self) -> str | None:
        """The text of the checkpoint's default chat template."""
        file = self.folder / "chat_template.jinja"
        if file.is_file():
            return read_text(file)
        file = self.folder / "tokenizer_config.json"
        found = read_json(file).get("chat_template") if file.is_file() else None
        if isinstance(found, list):  # several, by name
            found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
        if not isinstance(found, (str, type(None))):
            raise InputError(f"{file}: expected chat_template to be a text, found {reprlib.repr(found)}")
        return found or None

    def check_chat(self) -> None:
        template = self.chat_template()
        if self.chat not in ("auto", "on", "off"):
            raise InputError(f"--chat {self.chat}: expected one of auto, on, off")
        if self.thinking not in ("", "on", "off"):
            raise InputError(f"--thinking {self.thinking}: expected one of on, off")
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


def as_trained(config, folder: Path) -> None:
    """Give `config` the data, chat, system and thinking flags of the run that wrote a checkpoint, where they were not
    given: a student must be prompted as in its training. The data are those it was evaluated on, by name."""
    file = folder / "state.json"
    trained, said = read_json(file).get("config") if file.is_file() else {}, []
    if isinstance(trained, dict):
        sets = [trained.get(name) for name in ("eval_data", "data")]
        trained["data"] = next((s for s in sets if s and isinstance(s, str) and (HERE / s).is_dir()), "search")
    for name, default in (("data", "search"), ("chat", "auto"), ("system", ""), ("thinking", "")):
        value = trained.get(name, default) if isinstance(trained, dict) else None
        if not isinstance(value, str):
            raise InputError(f"{file}: not the state of a run, whose config would hold a text as {name}")
        if name not in getattr(config, "typed", (name,)) and value != default:
            setattr(config, name, value)
            said.append(f"--{name} {value}")
    if said:
        print(f"as in its training: {' '.join(said)}")


# --- a chat template is a program from a checkpoint that may loop or grow: it runs in a process with bounds

SECONDS, MEMORY, LONGEST = 2, 2**31, 10**6  # processor time, bytes, and characters that it writes


def render_elsewhere(folder: Path, template: str, chats: list[list[dict]], options: dict) -> list[str]:
    """What a chat template makes of conversations. Raises InputError when it fails or exceeds the bounds."""
    request = json.dumps({"chats": chats, "template": template, "options": options})
    answer = f"it takes more than {SECONDS} s or {MEMORY >> 30} GiB"
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(
            [sys.executable, "-m", "data.tokenizer"], cwd=HERE.parent, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            input=request, capture_output=True, text=True, timeout=100 * SECONDS, check=False,
        )
        if done.returncode >= 0:  # below: killed
            answer = json.loads(done.stdout or json.dumps(done.stderr[-300:]))
    if not isinstance(answer, list):
        raise InputError(f"{folder}: its chat template cannot be used here ({answer})")
    return answer


def render(chats: list[list[dict]], template: str, options: dict) -> list[str]:
    """The same, within the bounds that this system knows. transformers runs templates without access to Python."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    blank = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()))
    with contextlib.suppress(ImportError, ValueError):  # Windows has no limits, and macOS none of memory
        import resource

        end = math.ceil(time.process_time()) + SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (end, end))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    texts = blank.apply_chat_template(
        chats, chat_template=template, tokenize=False, add_generation_prompt=True, **options
    )
    if max(map(len, texts)) > LONGEST:
        raise ValueError(f"it writes more than {LONGEST:,} characters")
    return texts


if __name__ == "__main__":
    try:
        print(json.dumps(render(**json.load(sys.stdin))))
    except Exception as error:  # noqa: BLE001
        print(json.dumps(f"{type(error).__name__}: {error}"))
