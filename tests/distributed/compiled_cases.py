"""What the test of compiled engines trains."""

from dataclasses import dataclass

from tests.distributed.equality_cases import Case, variation


@dataclass(frozen=True)
class Compiled:
    """A case whose engine is compiled.

    Attributes:
        case: what it trains.
        backend: torch.compile's.
        statistics: whether the routers are counted. Not together with checkpointing: within a graph recomputation
            cannot be told from the first pass, and would count again.
    """

    case: Case
    backend: str = "eager"
    statistics: bool = True

    @property
    def name(self) -> str:
        return f"{self.backend}-{self.case.name}"


# few steps and layers, for the tracing: with three steps and all Linears the first launch took twice as long; q and k
# are siblings, which read their input at once where nothing is compiled
_TRACED = {"steps": 2, "targets": "q_proj k_proj down_proj"}
COMPILED_SUITES = {
    "compiled": [Compiled(Case(ds_config, 1, "sgd", "none", **_TRACED)) for ds_config in ("zero2", "zero3")],
    "compiled-variations": [
        *(Compiled(Case(ds_config, 1, "sgd", "full", **_TRACED), statistics=False) for ds_config in ("zero2", "zero3")),
        Compiled(variation(ds_config="zero2", **_TRACED)),
    ],
    "compiled-aot": [
        *(
            Compiled(Case(ds_config, 2, "adamw_torch", "none", router="input", **_TRACED), "aot_eager")
            for ds_config in ("zero2", "zero3")
        ),
        Compiled(variation(**_TRACED), "aot_eager"),
    ],
}
