"""tiktoken in the place of a byte-level BPE that a tokenizer.json describes: the same ids, three times as fast."""

import tiktoken
import tokenizers


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


def merges_make_all(vocab: dict[str, int], merges: list[tuple[str, str]], ignore_merges: bool) -> bool:
    """Whether to follow the list of merges, as tokenizers does, is to do what tiktoken does: merge any two neighbours
    that form a token, the one of the lowest id first.

    It is if the merges build every token from its own characters, since within a text these merge in the same order.
    With ignore_merges a token that is not built is found as well, where it is a whole piece; this is the same if all
    ways to split it in two are in the list.
    """
    plain, listed = tokenizers.models.BPE(vocab, merges), set(merges)
    for token in vocab:
        if len(plain.tokenize(token)) > 1:
            ways = {(token[:k], token[k:]) for k in range(1, len(token)) if token[:k] in vocab and token[k:] in vocab}
            if not (ignore_merges and ways <= listed):
                return False
    return True


def build_encoding(spec: dict, added: dict[int, tokenizers.AddedToken]) -> tuple[tiktoken.Encoding | None, str]:
    """The BPE of a tokenizer.json as a tiktoken.Encoding, or None and the reason why tiktoken would give other ids.
    added: all added tokens, also those of other files."""
    model, pattern, alphabet = spec["model"], split_pattern(spec.get("pre_tokenizer") or {}), byte_alphabet()
    if "merges" not in model:
        return None, "it is no BPE"
    special = {token.content: i for i, token in added.items()}
    vocab = {token: i for token, i in model["vocab"].items() if token not in special}
    if not all(c in alphabet for token in vocab for c in token):
        return None, "it is no byte-level BPE"
    if any(model.get(o) for o in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        return None, "its BPE has options that tiktoken lacks"
    if (spec.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
        return None, "it changes texts before it encodes them"
    if not pattern:
        return None, "it splits texts in another way than the kinds known here"
    if any(t.lstrip or t.rstrip or t.single_word for t in added.values()) or any(
            a != b and a in b for a in special for b in special):
        return None, "its added tokens take in white space, or one holds another"
    merges = [tuple(m if isinstance(m, list) else m.split(" ")) for m in model["merges"]]
    # tiktoken applies the merge whose result has the lowest id; tokenizers the merge that is listed first.
    ids = [vocab.get(a + b, -1) for a, b in merges]
    if ids != sorted(ids) or len({*vocab.values(), *special.values()}) < len(vocab) + len(special):
        return None, "its merges are not in the order of its ids, or two tokens share one"
    if not merges_make_all(vocab, merges, bool(model.get("ignore_merges"))):
        return None, "its merges do not make all of its tokens"
    ranks = {bytes(alphabet[c] for c in token): i for token, i in vocab.items()}
    ranks = {bytes([b]): 2**30 + b for b in range(256)} | ranks  # an id that nobody uses for a byte without a token
    found = tiktoken.Encoding("tokenizer.json", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    probe = "Is 2+3 five?\n\n\tIt's; 'no' would be wrong.\n"  # tiktoken leaves out what the pattern does not match
    if found.decode(found.encode(probe, disallowed_special=())) != probe:
        return None, "the pattern that splits its texts leaves some characters out"
    return found, ""
