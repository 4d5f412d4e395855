"""Make the demo model's tokenizer: byte-level BPE with the split pattern and the special tokens of LFM2.5's 128K family.

As in that family `ignore_merges` is on, so a split piece that is in the vocabulary becomes one token. The vocabulary holds the
256 bytes, the frequent pieces of the training text and accented letters (the only merges). Identifiers, names and digits stay
bytes on purpose: what has to be copied looks the same wherever it stands, so copying carries over to words never seen.

    python build_tokenizer.py OUT_FOLDER
"""

import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

import data
import words

SPLIT = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s"
SPECIALS = [
    "<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|fim_pre|>", "<|fim_mid|>", "<|fim_suf|>", "<|im_start|>", "<|im_end|>",
    "<|tool_list_start|>", "<|tool_list_end|>", "<|tool_call_start|>", "<|tool_call_end|>", "<|tool_response_start|>",
    "<|tool_response_end|>", "<image>", "<|img_thumbnail|>", "<|image_start|>", "<|image_end|>", "<think>", "</think>",
]
VISIBLE = {"<think>", "</think>"}  # survive decoding with skip_special_tokens
# Words of a JSON schema, which no tool or parameter copies often; every other bare lower-case word is spelled.
SCHEMA = """type function name description parameters object properties string required integer number boolean title additionalProperties
false true null strict enum default system user assistant tool List Today""".split()
ACCENTED = "áàâäãåéèêëíìîïóòôöõøúùûüñçšžýłæœßğćőÁÉÖÜÄ°×¡¿–—‘’“”…"
ROWS = 768  # embedding rows; a few stay unused, as in the real checkpoints


def pieces():
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
    ])


def frequent_pieces(pre, n_texts, limit):
    """Pieces by the number of texts they occur in, without the words that serve as contents."""
    r = random.Random(20260115)
    counts = Counter()
    special = re.compile("|".join(re.escape(s) for s in SPECIALS))
    for _ in range(n_texts):
        for text, _ in data.sample(r):
            for part in special.split(text):
                if part:
                    counts.update(sorted({p for p, _ in pre.pre_tokenize_str(part)}))
    word = re.compile(r"Ġ[a-z]+|[A-Z][a-z]+|[^A-Za-z0-9]+|'(s|m|re|ll|ve|t|d)|ĠI|JSON|ĠJSON|ĠAI")
    contents = {"Ġ" + w for w in words.COMMON + words.ADJECTIVES + words.VERBS + words.CONDITIONS + data.KEYS + ["celsius", "fahrenheit"]}
    keep = [p for p, n in counts.most_common() if len(p) > 1 and word.fullmatch(p) and all(c in "ĠĊ" or c.isascii() for c in p)
            and n >= n_texts / (50 if p in contents else 3000)]
    return list(dict.fromkeys(SCHEMA + keep))[:limit]


def build():
    pre = pieces()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    encode = {c: "".join(p for p, _ in pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(c)) for c in ACCENTED}
    merges = []
    for e in encode.values():
        for i in range(1, len(e)):
            if (e[:i], e[i]) not in merges:
                merges.append((e[:i], e[i]))
    joined = list(dict.fromkeys(a + b for a, b in merges))
    room = ROWS - 8 - len(alphabet) - len(joined) - len(SPECIALS)
    frequent = frequent_pieces(pre, 30000, room)
    order = alphabet + joined + [w for w in frequent if w not in joined and w not in alphabet]
    base = {t: i for i, t in enumerate(order + SPECIALS)}
    tk = Tokenizer(models.BPE(vocab=base, merges=merges, ignore_merges=True, byte_fallback=False, fuse_unk=False))
    tk.pre_tokenizer = pre
    tk.decoder = decoders.ByteLevel(add_prefix_space=True, trim_offsets=True, use_regex=True)
    tk.add_tokens([AddedToken(s, special=s not in VISIBLE, normalized=False) for s in SPECIALS])
    bos = tk.token_to_id("<|startoftext|>")
    tk.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False, add_prefix_space=True, use_regex=True),
        processors.TemplateProcessing(single="<|startoftext|> $A", pair="<|startoftext|> $A <|startoftext|> $B",
                                      special_tokens=[("<|startoftext|>", bos)]),
    ])
    return tk


def write(tk, out):
    out.mkdir(parents=True, exist_ok=True)
    tk.save(str(out / "tokenizer.json"), pretty=False)
    config = {
        "backend": "tokenizers", "bos_token": "<|startoftext|>", "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "is_local": False,
        "model_input_names": ["input_ids", "attention_mask"], "model_max_length": 1000000000000000019884624838656, "pad_token": "<|pad|>",
        "tokenizer_class": "TokenizersBackend",
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    tokenizer = build()
    write(tokenizer, Path(sys.argv[1]))
    print("tokens:", tokenizer.get_vocab_size())
