"""Deliberate bugs in block_sparse_attention, each of which a test must catch: `python tests/kernels/mutations.py`.

Every bug is one textual change applied to a copy of the package; the named tests then run against the copy and have to fail,
and they have to pass against an unchanged copy. Exits with 1 if a bug survives or a change no longer applies.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1] / "kernels" / "usv_kernels"
ATTENTION = "block_sparse_attention/"
FORWARD, BACKWARD, LAUNCH, CPU, CPU_BACK, TENSORS, PLAN, INT8, LOW = (
    ATTENTION + f for f in ("triton_forward.py", "triton_backward.py", "triton_launch.py", "cpu.py", "cpu_backward.py", "cpu_tensors.py", "cpu_plan.py",
                            "cpu_int8.py", "low_precision.py")
)  # fmt: skip

# Tests by short name: file and -k expression.
MAIN, PROXIES, LOWER = "test_block_sparse_attention.py", "test_block_proxy.py", "test_low_precision.py"
SUITES = {
    "tiles": (MAIN, "test_layouts_with_every_gradient and partial and triton"),
    "two tiles": (MAIN, "test_layouts_with_every_gradient and two and triton"),
    "clusters": (MAIN, "test_layouts_with_every_gradient and clusters and triton"),
    "scales": (MAIN, "test_head_sizes_precisions_and_activation_scales and 128-16.0-bf16-triton"),
    "halves": (MAIN, "test_head_sizes_precisions_and_activation_scales and 96-4.0 and triton"),
    "poison": (MAIN, "test_unused_slots_are_never_read and triton"),
    "closed": (MAIN, "test_closed_gates_and_closed_keys and triton"),
    "unbounded": (MAIN, "test_without_known_bounds and triton"),
    "lse": (MAIN, "test_only_lse_or_only_out_is_differentiated and triton"),
    "far": (MAIN, "test_rows_more_than_two_billion_elements_apart"),
    "cpu": (MAIN, "cpu and not hypothesis and not bit_equal"),
    "interface": ("test_block_sparse_attention_interface.py", "refusals or selection_round or inverted or tile_tables or bounds or longest or regular"),
    "memory": ("test_launch_memory.py", "dense"),
    "products": ("test_products.py", "not hypothesis"),
    "outside": (MAIN, "test_tokens_outside_every_block and triton"),
    "proxy": (PROXIES, "test_layouts_with_every_gradient and partial and triton"),
    "proxy parts": (PROXIES, "test_many_query_tiles"),
    "proxy slots": (PROXIES, "test_tokens_outside_every_block and triton"),
    "proxy cpu": (PROXIES, "test_layouts_with_every_gradient and (tiles or clusters) and cpu"),
    "proxy cpu uniform": (PROXIES, "test_without_bias_and_gate and cpu"),
    "proxy cpu logits": (PROXIES, "test_logits_that_exp and cpu"),
    "proxy means": (PROXIES, "test_means_of_any_layout"),
    "proxy alike": (PROXIES, "test_of_keys_that_are_all_alike and cpu"),
    "cpu runs": (MAIN, "test_runs_of_batches_on_the_cpu"),
    "proxy runs": (PROXIES, "test_runs_of_a_head_on_the_cpu"),
    "low cpu": (LOWER, "(test_layouts and (partial or clusters) or test_runs or smoothed) and cpu"),
    "low triton": (LOWER, "(test_layouts and partial or smoothed or test_head_sizes and 96 and bf16) and triton"),
    "low refusals": (LOWER, "test_refusals"),
}

# name, file, text, replacement, suite that must fail
MUTATIONS = [
    ("forward: key bias dropped", FORWARD, "mask=inside, other=0.0) + gate", "mask=inside, other=0.0) * 0 + gate", "tiles"),
    ("forward: gate dropped", FORWARD, "column = column_bias(bias_base, gate, start, offset, size, HAS_BIAS, BN)", "column = column_bias(bias_base, 0.0, start, offset, size, HAS_BIAS, BN)", "tiles"),
    ("forward: off-by-one tail", FORWARD, "inside = offset + column < size", "inside = offset + column <= size", "tiles"),
    ("forward: scale before the dot, rounded", FORWARD, 's = inner(q, q1, k, k1, D1) * scale', 's = inner((q * scale).to(q.dtype), q1, k, k1, D1)', "scales"),
    ("forward: no rescaling of the accumulator", FORWARD, "acc * shrink[:, None]", "acc", "tiles"),
    ("forward: no guard of rows without keys", FORWARD, 'tl.where(new_top == float("-inf"), 0.0, new_top)', "new_top", "closed"),
    ("forward: key block taken from the slot", FORWARD, "block = tl.load(list_ptr + slot, mask=slot < count, other=0)", "block = slot", "tiles"),
    ("forward: unused slot read ahead", FORWARD, "mask=slot < count, other=0)", "mask=slot < 1 << 30, other=0)", "poison"),
    ("forward: offset of a second tile lost", FORWARD, "offset = step % KV_TILES * BN", "offset = 0", "two tiles"),
    ("forward: nested loop skips a partial tile", FORWARD, "for offset in range(0, size, BN):", "for offset in range(0, size - BN + 1, BN):", "clusters"),
    ("forward: lse in base 2", FORWARD, "tl.log2(total) * LN2", "tl.log2(total)", "tiles"),
    ("forward: row start in 32 bits", FORWARD, "first = base + tl.cast(start, tl.int64) * stride", "first = base + start * stride", "far"),
    ("forward: rows past the block stored", FORWARD, "inside = (tl.arange(0, ROWS) < count)[:, None] & (tl.arange(0, DP) < D)[None, :]\n    tl.store", "inside = (tl.arange(0, ROWS) < ROWS)[:, None] & (tl.arange(0, DP) < D)[None, :]\n    tl.store", "clusters"),
    ("forward: padded channels read", FORWARD, "    if DP != D:\n        inside = inside & (tl.arange(0, DP) < D)[None, :]\n", "", "halves"),
    ("dq: delta forgotten", BACKWARD, 'inner(grad, grad1, v, v1, D1) - delta[:, None]', 'inner(grad, grad1, v, v1, D1)', "tiles"),
    ("dq: scale forgotten", BACKWARD, "start_q, rows, dq * scale, BM", "start_q, rows, dq, BM", "tiles"),
    ("dq: gate sum not reset between blocks", BACKWARD, "gate_sum = tl.where(step % KV_TILES == 0, 0.0, gate_sum)", "gate_sum = gate_sum + 0.0", "tiles"),
    ("dgate: last tile of a block forgotten", BACKWARD, "for tile in range(first, last):", "for tile in range(first, last - 1):", "unbounded"),
    ("dkv: gate dropped", BACKWARD, "(column + gate)[:, None]", "column[:, None]", "tiles"),
    ("dkv: size of another query block", BACKWARD, "tl.load(sizes_ptr + entry // K)", "tl.load(sizes_ptr + entry % K)", "clusters"),
    ("dkv: last entry forgotten", BACKWARD, "for step in range((end - first) * Q_TILES):", "for step in range((end - first - 1) * Q_TILES):", "tiles"),
    ("dkv: gate of another entry", BACKWARD, "            entry, start, size = next_entry, next_start, next_size", "            start, size = next_start, next_size", "tiles"),
    ("dkv: key bias gradient overwritten", BACKWARD, "dbias += tl.sum(ds, 1)", "dbias = tl.sum(ds, 1)", "tiles"),
    ("delta: gradient of lse ignored", BACKWARD, "delta -= tl.load(grad_lse_ptr", "delta -= 0 * tl.load(grad_lse_ptr", "lse"),
    ("launch: rows outside blocks uninitialised", LAUNCH, "out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)\n    lse", "out = torch.full(q.shape, 7.0, dtype=q.dtype, device=q.device)\n    lse", "outside"),
    ("launch: lists are built beside the gradients", LAUNCH, "dk, dv = (torch.zeros(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))",
     "dk, dv = (torch.zeros(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))\n    inverted = inverted_lists(*tensors[:2], tensors[4].shape[-1])", "memory"),
    ("launch: shortest lists first", LAUNCH, "argsort(dim=1, descending=True", "argsort(dim=1, descending=False", "interface"),
    ("launch: key tiles reordered, their rows not", LAUNCH, "tables = [x.expand(len(lengths), -1) for x in (block, start, rows)]",
     "tables = [x.expand(len(lengths), -1) for x in (block, start, rows.flip(1))]", "tiles"),
    ("inverted: entries of later key blocks overwrite earlier ones", "selection.py", "place = offsets.gather(-1, block.flatten(2)) +", "place =", "tiles"),
    ("inverted: unused slots take a listed entry's place", "selection.py", "last = num_q * capacity - 1", "last = 0", "tiles"),
    ("launch: bias of head 0 for all heads", LAUNCH, "bias.stride(1) if bias.shape[1] == heads and heads > 1 else 0", "0", "tiles"),
    ("launch: key layout of head 0 for all heads", LAUNCH, "return 0 if x.dim() == 1 else x.shape[-1]", "return 0", "clusters"),
    ("cpu: key bias dropped", TENSORS, ".index_select(0, b.kv_index).view(n, length)", ".index_select(0, b.kv_index).view(n, length) * 0", "cpu"),
    ("cpu: maximum left out whatever the gates", CPU, "for x in (bias, gate):", "for x in (bias,):", "cpu"),
    ("cpu: maximum left out whatever the bias", CPU, "for x in (bias, gate):", "for x in (gate,):", "cpu"),
    ("products: fp32 rounded where the CPU rounds", "_products.py", "(dtype == torch.bfloat16 or not _rounds())", "True", "products"),
    ("products: the process's setting left behind", "_products.py", "                torch.backends.mkldnn.matmul.fp32_precision = self.before", "                pass", "products"),
    ("products: whoever leaves first restores", "_products.py", "            self.inside -= 1\n            if self.inside == 0:", "            self.inside -= 1\n            if True:", "products"),
    ("products: whoever enters last remembers", "_products.py", "            if self.inside == 0:\n                self.before", "            if True:\n                self.before", "products"),
    ("cpu: backward's exponents in base 2", CPU_BACK, "exponential(s.sub_(lse_np1))", "torch.exp2(s.sub_(lse_np1), out=s)", "cpu"),
    ("cpu: forward's large exponents in base 2", CPU, "        exponential(s)\n", "        torch.exp2(s, out=s)\n", "cpu"),
    ("cpu: bias and gates in natural units beside scores in base 2", CPU, "column = column * unit", "column = column * 2", "cpu"),
    ("cpu: maximum never subtracted", CPU, "return bound <= 40.0", "return True", "cpu"),
    ("cpu: sums of earlier pieces not rescaled", CPU, "total.mul_(shrink)", "pass", "cpu"),
    ("cpu: output of earlier pieces not rescaled", CPU, "o_npD.mul_(shrink)", "pass", "cpu"),
    ("cpu: maximum of the last piece alone", CPU, "torch.maximum(top, s.amax(-1, keepdim=True), out=top)", "torch.amax(s, -1, keepdim=True, out=top)", "cpu"),
    ("cpu: a row that has met no key is spoiled", CPU, ".nan_to_num_(0.0)  # NaN of", "  # NaN of", "cpu"),
    ("cpu: only the last piece in dQ", CPU_BACK, "dq_npD.baddbmm_(ds, k_nLD) if begun else", "dq_npD if False else", "cpu"),
    ("cpu: gates of the first piece for all", PLAN, '"first_slot": begin // tile}', '"first_slot": 0}', "cpu"),
    ("cpu: a piece's gradients at the first one's tiles", PLAN, "sum_index=cut(b.sum_index)", "sum_index=cut(b.sum_index, 0, end - begin)", "cpu"),
    ("cpu: partial last tile unmasked", PLAN, "token >= length", "token > length", "cpu"),
    ("cpu: padded slots unmasked", PLAN, "invalid = None if unused is None else unused.repeat_interleave(tile, 1)", "invalid = None", "cpu"),
    ("cpu: padding rows write their own gradient", TENSORS, "index, values = index[valid], values[valid]", "pass", "cpu"),
    ("cpu: an input's place in its memory forgotten", TENSORS, "tile * x.shape[-1]), (x.shape[-1], 1))", "tile * x.shape[-1]), (x.shape[-1], 1), 0)", "cpu"),
    ("cpu: padded slots read a tile not listed", PLAN, "index.gather(1, (counts - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)", "lists // layout.num_q * layout.num_kv", "cpu"),
    ("cpu: padding of a partial tile reads tokens not listed", PLAN, "token.clamp(max=length - 1)", "token % length", "cpu"),
    ("cpu: a batch ends within another head", PLAN, "together = max(1, step // num_q)", "together = max(1, -(-step // num_q))", "cpu"),
    ("cpu: later batch overwrites dK", CPU_BACK, "dk_tiles.index_add_(0", "dk_tiles.index_copy_(0", "cpu"),
    ("cpu: sums of the part before left in the buffer", TENSORS, "length, x.shape[2])).zero_()", "length, x.shape[2]))", "cpu"),
    ("cpu: gradients of a later part at the first one's place", CPU_BACK, "dk_here, dv_here = dk[part.heads], dv[part.heads]", "dk_here, dv_here = (x[: part.heads.stop - part.heads.start] for x in (dk, dv))", "cpu"),
    ("cpu: keys of a later head read from a place a partial tile early", PLAN, "tiles // num_kv * kv_len", "tiles // num_kv * (kv_len - 1)", "cpu"),
    ("cpu: tiles of a later part added to the first head", CPU_BACK, "part.heads.start * (whole // layout.kv_tile)", "0", "cpu"),
    ("cpu: partial query tile taken for a whole one", PLAN, "layout.uniform and last % count:", "layout.uniform:", "cpu"),
    ("cpu: dQ without the scale", CPU_BACK, "torch.mul(dq_npD, scale,", "torch.mul(dq_npD, 1.0,", "cpu"),
    ("proxy: listed blocks are approximated too", FORWARD, 'tl.where(listed == 0, value, float("-inf"))', 'tl.where(index < N, value, float("-inf"))', "proxy"),
    ("proxy: log size dropped", FORWARD, "value = tl.load(bias_base + index, mask=index < N, other=0.0)", "value = tl.load(bias_base + index, mask=index < N, other=0.0) * 0", "proxy"),
    ("proxy: one past the last attended", FORWARD, "mask=index < N, other=1)", "mask=index < N, other=0)", "proxy"),
    ("proxy: forgotten in dQ", BACKWARD, "    if HAS_PROXY:\n", "    if False:\n", "proxy"),
    ("proxy: dK without the scale", BACKWARD, "first, N - first, dk * scale, BN", "first, N - first, dk, BN", "proxy"),
    ("proxy: gradient of sizes dropped", BACKWARD, "tl.store(dbias_ptr + place + index, dbias,", "tl.store(dbias_ptr + place + index, dbias * 0,", "proxy"),
    ("proxy: last query tile of a part lost", BACKWARD, "tl.minimum(part * each + each, tiles)", "tl.minimum(part * each + each, tiles) - 1", "proxy parts"),
    ("proxy: parts overlap", BACKWARD, "range(part * each, tl.minimum", "range(0, tl.minimum", "proxy parts"),
    ("proxy: unused slots count as listed", LAUNCH, "torch.where(used, lists, num_kv).long(), 1)", "lists.clamp(0, num_kv - 1).long(), 1)", "proxy slots"),
    ("proxy cpu: listed blocks are approximated too", TENSORS, "columns.masked_fill(listed,", "columns.masked_fill(listed & False,", "proxy cpu"),
    ("proxy cpu: log size dropped", TENSORS, "columns = proxy[2].reshape(groups, 1, number)", "columns = (proxy[2] * 0).reshape(groups, 1, number)", "proxy cpu"),
    ("proxy cpu: large logits without a maximum", CPU, "key_bias, gate, layout, scale, proxy)", "key_bias, gate, layout, scale)", "proxy cpu logits"),
    ("proxy cpu: rows of empty lists left out", PLAN, "((tokens[order] > 0) | empty)", "(tokens[order] > 0)", "proxy cpu"),
    ("proxy cpu: dQ begins with what the batch before left", CPU_BACK, "dq_npD if begun else dq_npD.zero_()", "dq_npD", "proxy cpu"),
    ("proxy cpu: dK without the scale", CPU_BACK, "dkeys.addmm_(ds.T, q, alpha=scale)", "dkeys.addmm_(ds.T, q)", "proxy cpu"),
    ("proxy cpu: a batch of several heads", PLAN, "max(1, step // num_q) if not apart else 1", "max(1, step // num_q)", "proxy cpu uniform"),
    ("proxy cpu: columns of all queries of a head are one memory", TENSORS, "columns.masked_fill(listed, ", "columns.masked_fill_(listed, ", "proxy alike"),
    ("proxy cpu: proxies of the first head for all", TENSORS, "return int(lists[0]) // self.num_q", "return 0", "proxy runs"),
    ("proxy cpu: lists of a run's first batch for all of it", CPU, "layout.row_list[run[0][0] : run[-1][1]]", "layout.row_list[run[0][0] : run[0][1]].repeat(len(run))[: run[-1][1] - run[0][0]]", "proxy runs"),
    ("proxy cpu: the first listed batch begins anew", CPU, "slice(first - begin, last - begin), proxies is not None", "slice(first - begin, last - begin), False", "proxy cpu"),
    ("proxy cpu: rows without any key divide by 0", CPU, "masked = proxies is not None", "masked = False", "proxy cpu"),
    ("cpu: a run longer than its rows", PLAN, "if run and last - run[0][0] > most:", "if run and last - run[0][0] > 1 << 20:", "cpu runs"),
    ("low cpu: keys not smoothed", INT8, "x = source[here].to(dtype) - mean", "x = source[here].to(dtype)", "low cpu"),
    ("low cpu: lse of smoothed keys", INT8, "keepdim=True).mul_(scale)", "keepdim=True).mul_(0)", "low cpu"),
    ("low cpu: mean key of the first head", INT8, "self.means[lists // self.number]", "self.means[lists * 0]", "low cpu"),
    ("low cpu: cut, not rounded", LOW, "scaled.round() if", "scaled if", "low cpu"),
    ("low cpu: scale of a run's first item", INT8, "mul_(self.q_scale[items])", "mul_(self.q_scale[:1])", "low cpu"),
    ("low cpu: queries of a run's first batch", INT8, "zip(self.q8[items],", "zip(self.q8,", "low cpu"),
    ("low cpu: bias and gates left out", INT8, "s.add_(column.unsqueeze(1))", "s", "low cpu"),
    ("low: a scale for all rows of a head", LOW, ".gather(2, q_block).unsqueeze(-1), dtype)", ".amax(-1, keepdim=True).expand_as(q_block).unsqueeze(-1), dtype)", "low triton"),
    ("low: keys not smoothed", LOW, "smooth = k - mean", "smooth = k", "low triton"),
    ("low: lse of smoothed keys", LOW, "lse + added", "lse", "low triton"),
    ("low: scale of the queries left out", FORWARD, "scale = scale * tl.load(q_scale_ptr + bh * q_len + start_q)", "pass", "low triton"),
    ("low: scales of the first head's keys", FORWARD, "k_scale_base = k_scale_ptr + bh * kv_len", "k_scale_base = k_scale_ptr", "low triton"),
    ("low: scales of the keys from the first on", FORWARD, "k_scale_base + start + key,", "k_scale_base + key,", "low triton"),
    ("low: scales of the first head's channels", FORWARD, "v_scale_ptr + bh * (D + D1)", "v_scale_ptr", "low triton"),
    ("low: scales of the first channels for the second part", FORWARD, "channel_scales(v_scale_base + D, D1, D1)", "channel_scales(v_scale_base, D1, D1)", "low triton"),
    ("low: P taken to the top, the output not back", FORWARD, "[None, :] / FP8_TOP", "[None, :]", "low triton"),
    ("low: gradients are not refused", LOW, "torch.is_grad_enabled() and", "False and", "low refusals"),
    ("low: a CPU without VNNI is not refused", LOW, "require(multiplies_int8(),", "require(True,", "low refusals"),
    ("proxy: a bias does not weigh", ATTENTION + "proxy.py", "key_bias.to(work).exp()", "(key_bias.to(work) * 0).exp()", "proxy means"),
    ("proxy: means of blocks out of order", ATTENTION + "proxy.py", "scatter(1, order.unsqueeze(-1).expand_as(sums), sums)", "add(sums)", "proxy means"),
    ("selection: tiles taken for regular whatever their starts", "selection.py", "if (starts == wanted).all() and", "if", "interface"),
    ("selection: a partial tile taken for a whole one", "selection.py", "(sizes == np.minimum(length - wanted, tile)).all()", "True", "interface"),
    ("selection: tiles need not reach the end", "selection.py", "< length <= count * tile", "< length", "interface"),
    ("selection: transpose keeps the starts", "selection.py", "self.kv_starts, self.kv_sizes, self.q_starts,\n                              self.q_sizes, self.kv_max", "self.q_starts, self.q_sizes, self.kv_starts,\n                              self.kv_sizes, self.kv_max", "interface"),
    ("checks: index N accepted", "_checks.py", "(lists < num_kv)", "(lists <= num_kv)", "interface"),
    ("checks: a promised bound is not kept", "_checks.py", "else sizes <= largest", "else sizes <= largest + 1", "interface"),
]  # fmt: skip


def fails(package_parent: Path, suite: str) -> bool:
    """Whether the suite fails against the package found there (or is killed, by a wild address, say); an error in
    collecting tests is no catch."""
    file, expression = SUITES[suite]
    environment = os.environ | {"PYTHONPATH": str(package_parent), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", str(HERE / file), "-k", expression]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1) and done.returncode > 0:
        raise SystemExit(f"suite {suite!r} did not run: {done.stdout[-1500:]}{done.stderr[-1500:]}")
    return done.returncode != 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mutations whose name contains this")
    args = parser.parse_args()
    chosen = [m for m in MUTATIONS if args.only in m[0]]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "usv_kernels"
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        for suite in dict.fromkeys(m[4] for m in chosen):
            if fails(Path(folder), suite):
                raise SystemExit(f"suite {suite!r} fails without any mutation")
        survivors = []
        for name, file, text, replacement, suite in chosen:
            target, begin = copy / file, time.monotonic()
            original = target.read_text()
            if original.count(text) < 1:
                raise SystemExit(f"{name}: the text to change is not in {file}; update the list")
            target.write_text(original.replace(text, replacement))
            caught = fails(Path(folder), suite)
            target.write_text(original)
            print(f"{'caught' if caught else 'SURVIVED'}  {name}  ({suite}, {time.monotonic() - begin:.0f} s)", flush=True)
            survivors += [] if caught else [name]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutations caught")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
