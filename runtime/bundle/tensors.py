"""The tensors of a bundle by name, from the architecture alone; the exporter lays them out and fills them."""

from __future__ import annotations

from edgeskip.runtime.bundle.architecture import Architecture


def bundle_tensors(
    architecture: Architecture,
) -> dict[str, tuple[tuple[int, ...], tuple[tuple[str, int], ...]]]:
    """Names the bundle's weights: shape, and the checkpoint tensors that make up its rows, with their rows."""
    a = architecture
    hidden, ffn = a.hidden_size, a.intermediate_size
    q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    tensors: dict[str, tuple[tuple[int, ...], tuple[tuple[str, int], ...]]] = {}

    def place(name: str, columns: int | None, *sources: tuple[str, int]) -> None:
        rows = sum(count for _, count in sources)
        tensors[name] = ((rows,) if columns is None else (rows, columns), sources)

    def same(name: str, rows: int, columns: int | None = None) -> None:
        place(name, columns, (name, rows))

    same("model.embed_tokens.weight", a.vocab_size, hidden)
    for i in range(a.num_layers):
        layer = f"model.layers.{i}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        same(f"{layer}.input_layernorm.weight", hidden)
        parts = (("q_proj", q), ("k_proj", kv), ("v_proj", kv))
        place(f"{attention}.qkv_proj.weight", hidden, *((f"{attention}.{p}.weight", n) for p, n in parts))
        if a.qkv_bias:
            place(f"{attention}.qkv_proj.bias", None, *((f"{attention}.{p}.bias", n) for p, n in parts))
        if a.qk_norm:
            same(f"{attention}.q_norm.weight", a.head_dim)
            same(f"{attention}.k_norm.weight", a.head_dim)
        same(f"{attention}.o_proj.weight", hidden, q)
        if a.output_bias:
            same(f"{attention}.o_proj.bias", hidden)
        same(f"{layer}.post_attention_layernorm.weight", hidden)
        pair = ("gate_proj", "up_proj")
        place(f"{mlp}.gate_up_proj.weight", hidden, *((f"{mlp}.{p}.weight", ffn) for p in pair))
        if a.mlp_bias:
            place(f"{mlp}.gate_up_proj.bias", None, *((f"{mlp}.{p}.bias", ffn) for p in pair))
        same(f"{mlp}.down_proj.weight", hidden, ffn)
        if a.mlp_bias:
            same(f"{mlp}.down_proj.bias", hidden)
    same("model.norm.weight", hidden)
    if not a.tie_word_embeddings:
        same("lm_head.weight", a.vocab_size, hidden)
    return tensors
