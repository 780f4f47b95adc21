"""Predictions from the catalog alone against what others measured on an H200: no GPU is needed.

    python benchmarks/predicted_vs_published.py

`expected` rests on the best kernels measured one by one (cuBLAS, cuDNN, FA3), so it is what a well-built stack reaches;
`they` are whole programs: vLLM 0.26 for serving, plain PyTorch with torch.compile and cuDNN attention for training.
"""

from __future__ import annotations

from rooflight.hardware import load
from rooflight.models.presets import resolve
from rooflight.workload.explain import explain_decoder
from rooflight.workload.program import Setting

# (model, setting, milliseconds seen, by whom); all on one H200, bf16, from shared/ANCHORS.md.
CASES = (
    ("llama-3.1-8b", Setting("decode", 1, 256), 4.60, "torch.compile"),
    ("llama-3.1-8b", Setting("decode", 1, 256), 4.90, "vLLM"),
    ("llama-3.1-8b", Setting("decode", 8, 256), 5.05, "vLLM"),
    ("llama-3.1-8b", Setting("decode", 32, 256), 5.39, "torch.compile"),
    ("llama-3.1-8b", Setting("decode", 128, 256), 7.51, "vLLM"),
    ("qwen3-0.6b", Setting("decode", 1, 256), 1.30, "torch.compile"),
    ("qwen3-0.6b", Setting("decode", 32, 256), 1.68, "torch.compile"),
    ("llama-3.1-8b", Setting("prefill", 1, 1024), 27.5, "vLLM"),
    ("llama-3.1-8b", Setting("prefill", 1, 8192), 216.0, "vLLM"),
    ("llama-3.1-8b", Setting("prefill", 16, 1024), 377.0, "vLLM"),
    ("train-152m", Setting("train", 32, 1024, optimizer="adamw-bf16"), 32768 / 414.0, "torch.compile"),
    ("train-1.2b", Setting("train", 8, 2048, optimizer="adamw-bf16"), 16384 / 68.1, "torch.compile"),
    ("train-3.2b", Setting("train", 4, 4096, optimizer="adamw-bf16"), 16384 / 25.8, "torch.compile"),
)


def main() -> None:
    """Print one table."""
    machine = load("h200")
    print("| model | phase | batch × context | roof | expected | they | who | expected ÷ theirs |")
    print("|---|---|---|---:|---:|---:|---|---:|")
    for model, setting, theirs, who in CASES:
        name, config = resolve(model)
        totals = explain_decoder(name, config, machine, setting).totals
        roof, expected = totals.roof_seconds * 1e3, totals.expected_seconds * 1e3
        print(
            f"| {name} | {setting.phase} | {setting.batch} × {setting.context} | {roof:.2f} ms | {expected:.2f} ms"
            f" | {theirs:.2f} ms | {who} | {expected / theirs:.2f} |"
        )


if __name__ == "__main__":
    main()
