"""Parameter names of VQGAN-family encoders and decoders, as two published models keep them."""

from dataclasses import replace
from typing import Literal

from gesso_core.models.keys.translate import KeyMap, Rule

_WB = "{p:weight|bias}"


def vqgan_keys(side: Literal["down", "up"], *, fused_qkv: bool) -> KeyMap:
    """Names of one encoder ("down") or decoder ("up"), without a prefix.

    Args:
        side: which of the two.
        fused_qkv: whether attention has one ``qkv`` (HART) or ``q``, ``k`` and ``v`` (VILA-U).
    """
    return (
        *_residual(f"{side}.{{i}}.block.{{j}}", "levels.{i}.blocks.{j}"),
        *_attention(f"{side}.{{i}}.attn.{{j}}", "levels.{i}.attentions.{j}", fused_qkv),
        Rule(f"{side}.{{i}}.{side}sample.conv.{_WB}", "levels.{i}.resample.conv.{p}"),
        *_residual("mid.block_{j:1|2}", "middle.block{j}"),
        *_attention("mid.attn_1", "middle.attention", fused_qkv),
        Rule(f"{{n:conv_in|norm_out|conv_out}}.{_WB}", "{n}.{p}"),
    )


def under(rules: KeyMap, foreign: str, ours: str) -> KeyMap:
    """The same rules for a part that sits below a prefix, on each side."""

    def prefixed(names: str | tuple[str, ...], prefix: str) -> str | tuple[str, ...]:
        if isinstance(names, str):
            return prefix + names
        return tuple(prefix + name for name in names)

    return tuple(
        replace(
            rule,
            foreign=prefixed(rule.foreign, foreign),
            ours=None if rule.ours is None else prefixed(rule.ours, ours),
        )
        for rule in rules
    )


def _residual(foreign: str, ours: str) -> KeyMap:
    return (
        Rule(f"{foreign}.{{n:norm1|norm2|conv1|conv2}}.{_WB}", f"{ours}.{{n}}.{{p}}"),
        Rule(f"{foreign}.nin_shortcut.{_WB}", f"{ours}.shortcut.{{p}}"),
    )


def _attention(foreign: str, ours: str, fused: bool) -> KeyMap:
    stacked = f"{foreign}.qkv.{_WB}" if fused else tuple(f"{foreign}.{n}.{_WB}" for n in "qkv")
    return (
        Rule(f"{foreign}.norm.{_WB}", f"{ours}.norm.{{p}}"),
        Rule(stacked, f"{ours}.qkv.{{p}}"),
        Rule(f"{foreign}.proj_out.{_WB}", f"{ours}.out.{{p}}"),
    )
