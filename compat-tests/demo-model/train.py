"""Train the demo model: a 2.6-million-parameter Lfm2MoeForCausalLM on the conversations of data.py.

    python build_tokenizer.py OUT && python train.py OUT --minutes 2.5
    python train.py OUT --check        compares the forward pass below with transformers' on the weights in OUT

OUT receives config.json, generation_config.json and model.safetensors in the layout of the LFM2 checkpoints on the hub, and
state.pt to go on from (`--resume`). A model this small is bound by kernel launches, so the forward pass is written out here with
few of them: all experts in two matrix products, routing weights from ranks, packed rows of many conversations, bf16 throughout
with f32 master weights, and a whole optimiser step as one CUDA graph. Experts are kept evenly used by moving the expert bias.
"""

import argparse
import json
import multiprocessing as mp
import os
import queue
import random
import threading
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import data

LAYERS = ["conv", "conv", "full_attention", "conv", "full_attention", "full_attention", "conv", "full_attention", "full_attention", "conv"]


def config_fields(tk):
    return {
        "architectures": ["Lfm2MoeForCausalLM"], "bos_token_id": tk.token_to_id("<|startoftext|>"), "conv_L_cache": 3, "conv_bias": False, "dtype": "bfloat16",
        "eos_token_id": tk.token_to_id("<|im_end|>"), "hidden_size": 128, "initializer_range": 0.02, "intermediate_size": 448, "layer_types": LAYERS,
        "max_position_embeddings": 16384, "model_type": "lfm2_moe", "moe_intermediate_size": 64, "norm_eps": 1e-05, "norm_topk_prob": True,
        "num_attention_heads": 2, "num_dense_layers": 2, "num_experts": 8, "num_experts_per_tok": 4, "num_hidden_layers": len(LAYERS),
        "num_key_value_heads": 1, "pad_token_id": tk.token_to_id("<|pad|>"), "rope_parameters": {"rope_theta": 5000000.0, "rope_type": "default"},
        "routed_scaling_factor": 1.0, "tie_word_embeddings": True, "use_cache": True, "use_expert_bias": True, "vocab_size": -(-tk.get_vocab_size() // 64) * 64,
    }


# ------------------------------------------------------------------------------------------------ data

def encode(tk, r):
    """One text: token ids and loss weights. Long answers weigh less per token than short ones."""
    ids, weights = [], []
    for text, weight in data.sample(r):
        new = tk.encode(text, add_special_tokens=False).ids
        ids += new
        weights += [weight] * len(new)
    n = sum(weights)
    scale = min(96, max(24, round(64 * (24 / max(n, 1)) ** 0.35)))
    return ids, [w * scale for w in weights]


def pack(texts, length):
    """First-fit rows of `length` tokens: (ids, positions, text number within the row, loss weights)."""
    rows, room = [], []
    for text in sorted(texts, key=lambda t: -len(t[0])):
        n = len(text[0])
        for i, left in enumerate(room):
            if left >= n:
                rows[i].append(text)
                room[i] -= n
                break
        else:
            rows.append([text])
            room.append(length - n)
    out = np.zeros((4, len(rows), length), np.int16)
    for i, row in enumerate(rows):
        at = 0
        for j, (ids, weights) in enumerate(row):
            s = slice(at, at + len(ids))
            out[0, i, s], out[1, i, s], out[2, i, s], out[3, i, s] = ids, np.arange(len(ids)), j + 1, weights
            at += len(ids)
    return out


def produce(out, tokenizer_file, seed, short, long):
    """Worker process: endless packed rows, most of them short, some long."""
    tk = Tokenizer.from_file(tokenizer_file)
    r = random.Random(seed)
    waiting = []
    while True:
        texts = [encode(tk, r) for _ in range(500)]
        waiting += [t for t in texts if short < len(t[0]) <= long]
        out.put((short, pack([t for t in texts if len(t[0]) <= short], short)))
        if len(waiting) >= 24:
            filler = sum(long - len(t[0]) for t in waiting)
            few = []
            while filler > 0:
                few.append(encode(tk, r))
                filler -= len(few[-1][0])
            out.put((long, pack([t for t in waiting + few if len(t[0]) <= long], long)))
            waiting = []


class Pool:
    """Rows of one length, kept on the device; the oldest give way when it is full."""

    def __init__(self, rows, length, device):
        self.data = torch.zeros((4, rows, length), dtype=torch.int16, device=device)
        self.filled = torch.zeros((), device=device)
        self.rows, self.at, self.total = rows, 0, 0

    def add(self, block):
        n = min(block.shape[1], self.rows - self.at)
        self.data[:, self.at:self.at + n] = torch.from_numpy(block[:, :n]).to(self.data.device)
        self.at = (self.at + n) % self.rows
        self.total += n
        self.filled.fill_(min(self.total, self.rows))

    def draw(self, n):
        index = (torch.rand(n, device=self.data.device) * self.filled).long()
        return self.data[:, index].long()


# ------------------------------------------------------------------------------------------------ the model

class Net:
    """LFM2-MoE. Tensors: f32 masters in `master`, what the forward pass uses in `w` (same keys)."""

    def __init__(self, fields, device, dtype):
        self.c, self.device, self.dtype = fields, device, dtype
        self.experts, self.top = fields["num_experts"], fields["num_experts_per_tok"]
        self.master, self.bias = {}, {}
        h, v = fields["hidden_size"], fields["vocab_size"]
        f, i, e = fields["intermediate_size"], fields["moe_intermediate_size"], self.experts
        self.heads = fields["num_attention_heads"]
        assert fields["num_key_value_heads"] == 1 and h == self.heads * 64
        last = (2 * len(LAYERS)) ** -0.5

        def new(name, *shape, std=None):
            std = std if std is not None else 0.8 * shape[-1] ** -0.5
            self.master[name] = torch.randn(shape, device=device) * std if std else torch.ones(shape, device=device)

        new("embed", v, h, std=0.05)
        new("norm", h, std=0)
        for n, kind in enumerate(LAYERS):
            new(f"{n}.norm1", h, std=0)
            new(f"{n}.norm2", h, std=0)
            if kind == "conv":
                new(f"{n}.in", 3 * h, h)
                new(f"{n}.taps", h, 3, std=0.4)
            else:
                new(f"{n}.qkv", h + 128, h)
                new(f"{n}.qnorm", 64, std=0)
                new(f"{n}.knorm", 64, std=0)
            new(f"{n}.out", h, h, std=last * h ** -0.5)
            if n < fields["num_dense_layers"]:
                new(f"{n}.up", 2 * f, h)
                new(f"{n}.down", h, f, std=last * f ** -0.5)
            else:
                new(f"{n}.gate", e, h)
                new(f"{n}.up", 2 * e * i, h)
                new(f"{n}.down", h, e * i, std=last * i ** -0.5)
                self.bias[n] = torch.zeros(e, device=device)
        self.w = {k: t.to(dtype, copy=True).requires_grad_() for k, t in self.master.items()}
        self.load = {}
        self.frequency = fields["rope_parameters"]["rope_theta"] ** (-torch.arange(32, device=device) / 32)

    def rms(self, x, name):
        return F.rms_norm(x, (x.shape[-1],), self.w[name], self.c["norm_eps"])

    def conv(self, x, n, near, far):
        b, c, u = F.linear(x, self.w[f"{n}.in"]).chunk(3, -1)
        z, taps = b * u, self.w[f"{n}.taps"]
        back1 = F.pad(z, (0, 0, 1, 0))[:, :-1] * near
        back2 = F.pad(z, (0, 0, 2, 0))[:, :-2] * far
        y = torch.addcmul(torch.addcmul(z * taps[:, 2], back1, taps[:, 1]), back2, taps[:, 0])
        return F.linear(c * y, self.w[f"{n}.out"])

    def attention(self, x, n, cos, sin, mask):
        qkv = F.linear(x, self.w[f"{n}.qkv"]).unflatten(-1, (self.heads + 2, 64))
        qk = F.rms_norm(qkv[:, :, :-1], (64,), None, self.c["norm_eps"])
        qk = qk * torch.stack([self.w[f"{n}.qnorm"]] * self.heads + [self.w[f"{n}.knorm"]])
        qk = qk * cos + torch.cat([-qk[..., 32:], qk[..., :32]], -1) * sin
        q, k, v = qk[:, :, :-1], qk[:, :, -1:].repeat(1, 1, self.heads, 1), qkv[:, :, -1:].repeat(1, 1, self.heads, 1)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        return F.linear(y.transpose(1, 2).flatten(2), self.w[f"{n}.out"])

    def feed_forward(self, x, n, real):
        gate, up = F.linear(x, self.w[f"{n}.up"]).chunk(2, -1)
        y = F.silu(gate) * up
        if n in self.bias:
            score = F.linear(x, self.w[f"{n}.gate"]).float().sigmoid()
            order = score.detach() + self.bias[n]
            chosen = ((order.unsqueeze(-2) > order.unsqueeze(-1)).sum(-1) < self.top).float()  # how many beat this one
            self.load[n] = (chosen * real).sum((0, 1))
            weight = score * chosen
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-6)
            y = (y.unflatten(-1, (self.experts, -1)) * weight.unsqueeze(-1).to(y.dtype)).flatten(2)
        return F.linear(y, self.w[f"{n}.down"])

    def logits(self, ids, pos, text):
        """[B, T] token ids, positions and text numbers (0 = nothing) -> [B, T, V]. Texts of one row do not see each other."""
        length = ids.shape[1]
        same = (text[:, :, None] == text[:, None, :]) & torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        mask = torch.zeros(same.shape, dtype=self.dtype, device=ids.device).masked_fill(~same, float("-inf"))[:, None]
        near, far = (pos >= 1).to(self.dtype)[..., None], (pos >= 2).to(self.dtype)[..., None]
        angle = pos[..., None].float() * self.frequency
        cos, sin = (torch.cat([t, t], -1).to(self.dtype)[:, :, None] for t in (angle.cos(), angle.sin()))
        real = (text > 0).float()[..., None]
        one_hot = (ids[..., None] == torch.arange(self.c["vocab_size"], device=ids.device)).to(self.dtype)
        x = one_hot @ self.w["embed"]  # its gradient is a product too, quicker than sorting ids
        for n, kind in enumerate(LAYERS):
            y = self.rms(x, f"{n}.norm1")
            x = x + (self.conv(y, n, near, far) if kind == "conv" else self.attention(y, n, cos, sin, mask))
            x = x + self.feed_forward(self.rms(x, f"{n}.norm2"), n, real)
        return F.linear(self.rms(x, "norm"), self.w["embed"])

    def hub_names(self):
        """(name in the checkpoint, tensor here, how to cut it out)"""
        h = self.c["hidden_size"]
        yield "model.embed_tokens.weight", "embed", lambda t: t
        yield "model.embedding_norm.weight", "norm", lambda t: t
        for n, kind in enumerate(LAYERS):
            p = f"model.layers.{n}."
            yield p + "operator_norm.weight", f"{n}.norm1", lambda t: t
            yield p + "ffn_norm.weight", f"{n}.norm2", lambda t: t
            if kind == "conv":
                yield p + "conv.in_proj.weight", f"{n}.in", lambda t: t
                yield p + "conv.conv.weight", f"{n}.taps", lambda t: t.unsqueeze(1)
                yield p + "conv.out_proj.weight", f"{n}.out", lambda t: t
            else:
                yield p + "self_attn.q_proj.weight", f"{n}.qkv", lambda t: t[:h]
                yield p + "self_attn.k_proj.weight", f"{n}.qkv", lambda t: t[h:h + 64]
                yield p + "self_attn.v_proj.weight", f"{n}.qkv", lambda t: t[h + 64:]
                yield p + "self_attn.q_layernorm.weight", f"{n}.qnorm", lambda t: t
                yield p + "self_attn.k_layernorm.weight", f"{n}.knorm", lambda t: t
                yield p + "self_attn.out_proj.weight", f"{n}.out", lambda t: t
            p += "feed_forward."
            if n not in self.bias:
                yield p + "w1.weight", f"{n}.up", lambda t: t.chunk(2)[0]
                yield p + "w3.weight", f"{n}.up", lambda t: t.chunk(2)[1]
                yield p + "w2.weight", f"{n}.down", lambda t: t
                continue
            yield p + "gate.weight", f"{n}.gate", lambda t: t
            for e in range(self.experts):
                yield f"{p}experts.{e}.w1.weight", f"{n}.up", lambda t, e=e: t.chunk(2)[0].chunk(self.experts)[e]
                yield f"{p}experts.{e}.w3.weight", f"{n}.up", lambda t, e=e: t.chunk(2)[1].chunk(self.experts)[e]
                yield f"{p}experts.{e}.w2.weight", f"{n}.down", lambda t, e=e: t.chunk(self.experts, 1)[e]

    def export(self, out):
        """bf16 weights with one tensor per expert matrix; expert_bias stays F32."""
        tensors = {name: cut(self.master[mine]).to("cpu", torch.bfloat16).contiguous() for name, mine, cut in self.hub_names()}
        tensors |= {f"model.layers.{n}.feed_forward.expert_bias": b.cpu().clone() for n, b in self.bias.items()}
        save_file(dict(sorted(tensors.items())), str(out / "model.safetensors"), metadata={"format": "pt"})
        os.chmod(out / "model.safetensors", 0o644)
        (out / "config.json").write_text(json.dumps(self.c, indent=2) + "\n")
        generation = {
            "_from_model_config": False, "bos_token_id": self.c["bos_token_id"], "do_sample": True, "eos_token_id": self.c["eos_token_id"],
            "pad_token_id": self.c["pad_token_id"], "temperature": 0.2, "top_k": 80,
        }
        (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        torch.save({"master": self.master, "bias": self.bias}, out / "state.pt")

    @torch.no_grad()
    def load_hub(self, file):
        tensors = load_file(file)
        for name, mine, cut in self.hub_names():
            cut(self.master[mine]).copy_(tensors[name])
        for n in self.bias:
            self.bias[n].copy_(tensors[f"model.layers.{n}.feed_forward.expert_bias"])
        self.refresh()

    @torch.no_grad()
    def refresh(self):
        torch._foreach_copy_(list(self.w.values()), list(self.master.values()))


def check(folder):
    """Largest difference of the logits to transformers' own model, on packed rows, in f32."""
    from transformers import Lfm2MoeForCausalLM
    net = Net(json.loads((folder / "config.json").read_text()), torch.device("cpu"), torch.float32)
    net.load_hub(folder / "model.safetensors")
    stock = Lfm2MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tk, r = Tokenizer.from_file(str(folder / "tokenizer.json")), random.Random(3)
    texts = [t for t in (encode(tk, r) for _ in range(8)) if len(t[0]) <= 1024]
    rows = torch.from_numpy(pack(texts, 1024)).long()
    with torch.no_grad():
        got = net.logits(*rows[:3])
        worst = 0.0
        for b in range(rows.shape[1]):
            for j in range(1, int(rows[2, b].max()) + 1):
                at = rows[2, b] == j
                want = stock(rows[0, b][at][None], use_cache=False).logits[0]
                worst = max(worst, float((got[b][at] - want).abs().max()))
    print(f"largest logit difference to transformers: {worst:.1e} (logits' standard deviation {float(got.std()):.2f})")


# ------------------------------------------------------------------------------------------------ training

class Trainer:
    def __init__(self, net, lr):
        self.net, device = net, net.device
        self.cuda = device.type == "cuda"
        self.lr = torch.tensor(lr, device=device)
        self.bias_step = torch.tensor(1e-3, device=device)
        self.live, self.masters = list(net.w.values()), list(net.master.values())
        for m in self.masters:
            m.grad = torch.zeros_like(m)
        decayed = [m for k, m in net.master.items() if m.ndim > 1 and k != "embed" and not k.endswith("taps")]
        chosen = {id(m) for m in decayed}
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": [m for m in self.masters if id(m) not in chosen], "weight_decay": 0.0}]
        self.opt = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.98), eps=1e-9, fused=self.cuda or None, capturable=self.cuda)
        self.stats = torch.zeros(4, device=device)  # loss, share of right tokens, gradient norm, share of the busiest expert

    def step(self, pool, rows):
        ids, pos, text, weight = pool.draw(rows)
        logits = self.net.logits(ids, pos, text)[:, :-1].float().flatten(0, 1)
        target, w = ids[:, 1:].flatten(), weight[:, 1:].float().flatten()
        loss = (F.cross_entropy(logits, target, reduction="none") * w).sum() / w.sum()
        loss.backward()
        with torch.no_grad():
            grads = [m.grad for m in self.masters]
            torch._foreach_copy_(grads, [p.grad for p in self.live])
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
            torch._foreach_mul_(grads, (1.0 / (norm + 1e-6)).clamp(max=1.0))
            self.opt.step()
            self.net.refresh()
            busiest = []
            for n, bias in self.net.bias.items():
                share = self.net.load[n] / self.net.load[n].sum()
                bias += self.bias_step * torch.sign(1.0 / share.numel() - share)
                busiest.append(share.max())
            learned = (w > 0).float()
            right = ((logits.argmax(-1) == target).float() * learned).sum() / learned.sum()
            self.stats.copy_(torch.stack([loss.detach(), right, norm, torch.stack(busiest).max()]))

    def forget_gradients(self):
        for p in self.live:
            p.grad = None

    def capture(self, pool, rows):
        """The step as a CUDA graph; returns what replays it."""
        if not self.cuda:
            return lambda: (self.forget_gradients(), self.step(pool, rows))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.forget_gradients()
                self.step(pool, rows)
        torch.cuda.current_stream().wait_stream(side)
        self.forget_gradients()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step(pool, rows)
        return graph.replay


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("out", type=Path)
    ap.add_argument("--minutes", type=float, default=4.0)
    ap.add_argument("--lr", type=float, default=3e-3)
    ap.add_argument("--rows", type=int, default=32, help="rows of a short batch")
    ap.add_argument("--short", type=int, default=1024)
    ap.add_argument("--long", type=int, default=2048)
    ap.add_argument("--long-every", type=int, default=12, help="every so many steps one of long rows")
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    ap.add_argument("--resume", type=Path, help="a training state to start from")
    ap.add_argument("--warmup", type=float, default=0.02, help="share of the time")
    ap.add_argument("--log-every", type=int, default=250)
    ap.add_argument("--check", action="store_true")
    a = ap.parse_args()
    if a.check:
        return check(a.out)

    tokenizer_file = str(a.out / "tokenizer.json")
    tk = Tokenizer.from_file(tokenizer_file)
    fields = config_fields(tk)
    ready = mp.Queue(maxsize=64)
    workers = [mp.Process(target=produce, args=(ready, tokenizer_file, a.seed * 1000 + w, a.short, a.long), daemon=True) for w in range(a.workers)]
    for w in workers:
        w.start()

    torch.manual_seed(a.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = Net(fields, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    if a.resume:
        state = torch.load(a.resume, map_location=device)
        for mine, theirs in ((net.master, state["master"]), (net.bias, state["bias"])):
            for k, t in theirs.items():
                mine[k].copy_(t)
        net.refresh()
    print(f"{sum(t.numel() for t in net.master.values()):,} parameters on {device}", flush=True)
    cuda = device.type == "cuda"
    pools = {a.short: Pool(400_000 if cuda else 2000, a.short, device), a.long: Pool(60_000 if cuda else 500, a.long, device)}
    arrived = queue.Queue(maxsize=64)

    def receive():
        while True:
            arrived.put(ready.get())

    threading.Thread(target=receive, daemon=True).start()

    def refill(block):
        while True:
            try:
                length, rows = arrived.get(timeout=120) if block else arrived.get_nowait()
            except queue.Empty:
                return
            pools[length].add(rows)
            if block:
                return

    started = time.time()
    while pools[a.short].total < 20 * a.rows or pools[a.long].total < 8:
        refill(block=True)
    print(f"first rows after {time.time() - started:.1f} s", flush=True)
    trainer = Trainer(net, 1e-6)
    run_short = trainer.capture(pools[a.short], a.rows)
    run_long = trainer.capture(pools[a.long], max(1, a.rows * a.short // a.long))
    print(f"captured after {time.time() - started:.1f} s", flush=True)

    begin, step = time.time(), 0
    while True:
        t = (time.time() - begin) / (60 * a.minutes)
        if t >= 1:
            break
        lr = a.lr * min(1.0, t / a.warmup) * (1 - max(0.0, (t - 0.1) / 0.9)) if t < 1 else 0.0
        trainer.lr.fill_(max(lr, 1e-7))
        trainer.bias_step.fill_(1e-3 if t < 0.6 else 2e-4 if t < 0.85 else 0.0)
        for _ in range(10):
            step += 1
            (run_long if step % a.long_every == 0 else run_short)()
            if step % a.log_every == 0:
                s = trainer.stats.tolist()
                tokens = step * a.rows * a.short
                print(f"step {step} t {time.time() - begin:.1f}s lr {lr:.2e} loss {s[0]:.4f} right {s[1]:.4f} norm {s[2]:.2f} busiest {s[3]:.3f} "
                      f"tokens {tokens / 1e6:.0f}M fresh {pools[a.short].total * a.short / tokens:.2f}", flush=True)
        refill(block=False)
        if cuda:
            torch.cuda.synchronize()
    net.export(a.out)
    print(f"{step} steps, {time.time() - begin:.0f} s; model.safetensors {os.path.getsize(a.out / 'model.safetensors'):,} bytes", flush=True)
    for w in workers:
        w.kill()
    os._exit(0)  # threads still wait for the workers


if __name__ == "__main__":
    main()
