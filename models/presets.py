"""Presets for pipelines: the models of CheckFree (arXiv 2506.15461, table 4) with their true parameter counts.

They are named as in the paper; the names are not the counts. The feed-forward width is 4 x embed as in the authors'
code, unless the name ends in ``_narrow`` (LLaMA's 8/3 x embed).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from models.llama import LlamaConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelinePreset:
    """A model, how it is cut into stages, and what the paper trained it with."""

    model: LlamaConfig
    stages: int
    context: int  # tokens
    learning_rate: float
    parameters: int  # exact; tests compare it with the shapes

    @property
    def layers_per_stage(self) -> int:
        return self.model.layers // self.stages


def _paper(embed: int, heads: int, layers: int, mlp: int, epsilon: float = 1e-6) -> LlamaConfig:
    return LlamaConfig(
        vocab=32_000,
        embed=embed,
        mlp=mlp,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        tied=False,
        norm_epsilon=epsilon,
    )


def _both(name: str, wide: PipelinePreset, narrow_mlp: int, narrow_parameters: int) -> dict[str, PipelinePreset]:
    narrow = replace(wide, model=replace(wide.model, mlp=narrow_mlp), parameters=narrow_parameters)
    return {name: wide, f"{name}_narrow": narrow}


PIPELINE_PRESETS: dict[str, PipelinePreset] = {
    "toy": PipelinePreset(
        model=LlamaConfig(vocab=256, embed=64, mlp=256, layers=12, heads=4, kv_heads=4, tied=False, norm_epsilon=1e-6),
        stages=6,
        context=64,
        learning_rate=2e-3,
        parameters=820_800,
    ),
    **_both(
        "checkfree_124m",
        PipelinePreset(
            model=_paper(512, 8, 12, 2048), stages=4, context=512, learning_rate=6e-4, parameters=83_112_448
        ),
        1536,
        73_675_264,
    ),
    **_both(
        "checkfree_500m",
        PipelinePreset(
            model=_paper(1024, 16, 24, 4096), stages=6, context=1024, learning_rate=3e-4, parameters=468_239_360
        ),
        2816,
        373_867_520,
    ),
    **_both(
        "checkfree_1_5b",
        PipelinePreset(
            model=_paper(2048, 16, 24, 8192), stages=6, context=4096, learning_rate=3e-4, parameters=1_741_785_088
        ),
        5632,
        1_364_297_728,
    ),
}
