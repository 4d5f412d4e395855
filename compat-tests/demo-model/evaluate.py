"""Measure the demo model with stock transformers: fp32 arithmetic on the bf16 weights, greedy.

    python evaluate.py FOLDER --held-out 2000             accuracy per behaviour on unseen items
    python evaluate.py FOLDER --cases cases.json          the hand-written requests
    python evaluate.py FOLDER --cases cases.json --golden demo-golden.json    and write token ids of a few of them
"""

import argparse
import ast
import datetime
import json
import os
import random
import time
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers.utils.chat_template_utils as templates
from transformers import AutoTokenizer, Lfm2MoeForCausalLM

import data

GOLDEN = ("hello", "sum", "json", "weather", "parallel")  # cases whose token ids are kept
COMPLETIONS = {"completion": "The capital of France is", "completion_fox": "The quick brown fox"}
TODAY = datetime.datetime(2026, 1, 15, 12, 34, 56)


class FrozenDate(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(TODAY.year, TODAY.month, TODAY.day, TODAY.hour, TODAY.minute, TODAY.second)


def load(folder, device):
    tk = AutoTokenizer.from_pretrained(folder)
    model = Lfm2MoeForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").to(device).eval()
    model.set_experts_implementation("eager")
    return tk, model


# ------------------------------------------------------------------------------------------------ held-out items

def kind_of(c, i, text):
    before = c.turns[i - 1].role
    name = c.kind
    if text.startswith("<|tool_call_start|>"):
        name = "parallel call" if "), " in text else "call"
        name += " 1 tool" if len(c.tools) == 1 else " 2-3 tools" if len(c.tools) <= 3 else " 4+ tools"
        history = any(t.role == "assistant" for t in c.turns[:i])
        return name + (", later turn" if history else "")
    if before == "tool":
        return "answer from results" if i >= 2 and c.turns[i - 2].role == "tool" else "answer from result"
    if text.startswith("<think>"):
        return "sum with <think>" + (" (tools given)" if c.tools else "")
    if c.tools:
        return "no call needed (tools given)"
    names = {"greeting": "greeting", "fixed": "small talk", "address": "say hello to", "repeat": "repeat", "story": "story", "question": "question", "count": "count",
             "json_request": "JSON", "extract": "JSON extracted", "remember": "memory"}
    if i < len(c.turns) - 1:
        return "earlier turn"
    return names.get(name, name) + (", later turn" if i > 1 else "")


def held_out_items(n, seed, split):
    """(kind, prompt text, expected text): every learned assistant turn of unseen conversations."""
    r, items = random.Random(seed), []
    while len(items) < n:
        c = data.conversation(r, split)
        for i, t in enumerate(c.turns):
            if t.role != "assistant" or all(w == 0 for _, w in t.pieces):
                continue
            opening = ""
            if any(w == 0 for _, w in t.pieces):  # the opening is forced upon the model
                if c.kind != "forced" or i + 1 < len(c.turns) or len(t.pieces) == 1:
                    continue
                opening = t.pieces[0][0]
            head = data.Conversation(c.kind, c.system, c.tools, c.turns[:i], c.date)
            prompt = "".join(s for s, _ in data.render(head)) + "<|im_start|>assistant\n" + opening
            kind = "JSON forced by a grammar" if opening else kind_of(c, i, t.text)
            items.append((kind, prompt, t.text[len(opening):] + "<|im_end|>"))
    return items


@torch.no_grad()
def follows(model, batch, device):
    """Whether greedy decoding gives exactly the expected tokens, for each (prompt ids, expected ids): one forward pass tells."""
    width = max(len(p) + len(e) for p, e in batch)
    ids = torch.zeros((len(batch), width), dtype=torch.long)
    for i, (p, e) in enumerate(batch):
        ids[i, :len(p) + len(e)] = torch.tensor(p + e)
    best = model(input_ids=ids.to(device), attention_mask={"full_attention": None, "conv": None}, use_cache=False).logits.argmax(-1).cpu()
    return [best[i, len(p) - 1:len(p) + len(e) - 1].tolist() == e for i, (p, e) in enumerate(batch)]


@torch.no_grad()
def greedy(model, ids, limit, device, **kw):
    return model.generate(torch.tensor([ids], device=device), attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=device), do_sample=False,
                          max_new_tokens=limit, temperature=None, top_k=None, return_dict_in_generate=True, **kw)


def held_out(tk, model, device, n, seed, split, show=12, save=None):
    eos, budget = model.config.eos_token_id, 100_000 if device.type == "cuda" else 6000
    coded = [(k, tk.encode(p, add_special_tokens=False), tk.encode(e, add_special_tokens=False), p, e) for k, p, e in held_out_items(n, seed, split)]
    coded.sort(key=lambda x: len(x[1]) + len(x[2]))
    score, wrong, batch, started = defaultdict(lambda: [0, 0, 0]), [], [], time.time()
    for i, item in enumerate(coded):
        batch.append(item)
        if i + 1 < len(coded) and (len(batch) + 1) * (len(coded[i + 1][1]) + len(coded[i + 1][2])) <= budget:
            continue
        for (kind, ids, want, prompt, expected), right in zip(batch, follows(model, [b[1:3] for b in batch], device)):
            out = want if right else greedy(model, ids, len(want) + 40, device).sequences[0, len(ids):].tolist()
            got = tk.decode(out, skip_special_tokens=False)  # other tokens may spell the same text
            s = score[kind]
            s[0] += 1
            s[1] += got == expected
            s[2] += out[-1] == eos
            if got != expected:
                wrong.append((kind, prompt[-160:].split("<|im_start|>user\n")[-1], expected, got))
        batch = []
    lines = [f"| {k} | {s[0]} | {100 * s[1] / s[0]:.1f} % | {100 * s[2] / s[0]:.1f} % |" for k, s in sorted(score.items())]
    total = [sum(s[i] for s in score.values()) for i in range(3)]
    print("| behaviour | items | exactly as expected | stops by itself |\n|---|---|---|---|")
    print("\n".join(lines + [f"| **all** | {total[0]} | {100 * total[1] / total[0]:.1f} % | {100 * total[2] / total[0]:.1f} % |"]))
    print(f"({time.time() - started:.0f} s)")
    for kind, prompt, expected, got in wrong[:show]:
        print(f"  [{kind}] …{prompt!r}\n      want {expected!r}\n      got  {got!r}")
    if save:
        Path(save).write_text("\n".join(json.dumps(w, ensure_ascii=False) for w in wrong) + "\n")


# ------------------------------------------------------------------------------------------------ hand-written cases

def parse_calls(text):
    """[{name, arguments}] of the first tool call block, or None."""
    if "<|tool_call_start|>" not in text:
        return None
    inner = text.split("<|tool_call_start|>")[1].split("<|tool_call_end|>")[0]
    tree = ast.parse(inner, mode="eval").body
    return [{"name": c.func.id, "arguments": {k.arg: ast.literal_eval(k.value) for k in c.keywords}} for c in tree.elts]


def check(expect, text, stopped):
    """What is wrong with an answer; an empty list if nothing."""
    bad = []
    reasoning = text.split("</think>")[0].removeprefix("<think>") if text.startswith("<think>") else None
    content = text.split("</think>")[-1]
    try:
        found = parse_calls(text)
    except (SyntaxError, ValueError, AttributeError) as e:
        found = f"unreadable: {e}"
    reason = "length" if not stopped else "tool_calls" if found else "stop"
    if expect.get("tool_calls") != found:
        bad.append(f"calls {found}")
    if "finish_reason" in expect and expect["finish_reason"] != reason:
        bad.append(f"finish_reason {reason}")
    if "reasoning" in expect and expect["reasoning"] != bool(reasoning):
        bad.append(f"reasoning {reasoning!r}")
    if "content" in expect and expect["content"] != content:
        bad.append(f"content {content!r}")
    bad += [f"lacks {s!r}" for s in expect.get("content_contains", []) if s not in content]
    return bad


def run_cases(tk, model, device, path, golden=None):
    """Answer every case; returns how many fail."""
    templates.datetime = FrozenDate
    cases, failed, kept = json.loads(Path(path).read_text()), 0, {}
    prompts = []
    for c in cases:
        text = tk.apply_chat_template(c["messages"], tools=c.get("tools"), tokenize=False, add_generation_prompt=True)
        prompts.append((c["id"], tk(text, add_special_tokens=False)["input_ids"], c["expect"]))
    prompts += [(name, tk(text)["input_ids"], None) for name, text in COMPLETIONS.items()]
    for name, ids, expect in prompts:
        run = greedy(model, ids, 400, device, output_logits=True)
        new = run.sequences[0, len(ids):].tolist()
        stopped = new[-1] == model.config.eos_token_id
        answer = tk.decode(new[:-1] if stopped else new, skip_special_tokens=False)
        top = torch.stack([x[0].float().topk(2).values for x in run.logits])
        margin = float((top[:, 0] - top[:, 1]).min())
        bad = [] if stopped else ["does not stop"]
        if expect is not None:
            bad = check(expect, answer, stopped)
        failed += bool(bad)
        print(f"{'FAIL' if bad else 'ok  '} {name} ({len(ids)} + {len(new)} tokens, margin {margin:.2f}): {answer[:110]!r} {bad or ''}", flush=True)
        if name in GOLDEN or expect is None:
            kept[name] = {"prompt_ids": ids, "output_ids": new, "text": answer, "smallest_margin": round(margin, 4)}
    print(f"{len(prompts) - failed} of {len(prompts)} pass")
    if golden:
        about = "Greedy answers of the demo model, f32 arithmetic on the bf16 weights; an output ends with <|im_end|>. In prompts today is 2026-01-15."
        rows = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in kept.items())
        Path(golden).write_text(f'{{"about": {json.dumps(about)}, "cases": {{\n{rows}\n}}}}\n')
    return failed


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("folder", type=Path)
    ap.add_argument("--held-out", type=int, default=0)
    ap.add_argument("--split", default="test", choices=("values", "test"), help="what is unseen: the values, or the phrasings and tool names too")
    ap.add_argument("--seed", type=int, default=99)
    ap.add_argument("--show", type=int, default=12)
    ap.add_argument("--save", help="write the wrong answers here, one JSON list a line")
    ap.add_argument("--cases")
    ap.add_argument("--golden")
    a = ap.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tk, model = load(a.folder, device)
    if a.held_out:
        held_out(tk, model, device, a.held_out, a.seed, a.split, show=a.show, save=a.save)
    if a.cases:
        raise SystemExit(run_cases(tk, model, device, a.cases, a.golden) > 0)


if __name__ == "__main__":
    main()
