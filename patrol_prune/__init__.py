"""patrol-prune: prune the edge half of a split network so that what it uploads is hard to invert.

    import patrol_prune as pp

    split = pp.Split(model, example_inputs, at="layer3")
    objective = pp.PatrolObjective(split, task_loss, beta=10.0)
    importance = pp.PatrolImportance(objective)
    pruner = pp.PatrolPruner(model, example_inputs, importance, split=split, edge_macs=0.5)
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "PatrolError": "errors",
    "InputError": "errors",
    "UnsupportedModelError": "errors",
    "BudgetError": "errors",
    "TrainingError": "errors",
    "CheckpointError": "errors",
    "RunDirectoryError": "errors",
    "UnmetLimitsError": "errors",
    "MissingPackageError": "errors",
    "Normalization": "pixels",
    "PrivateRegions": "regions",
    "ImageSet": "data",
    "Batches": "data",
    "load_image_folder": "data",
    "ReidImage": "reid_layout",
    "ReidSet": "reid_layout",
    "read_reid": "reid_layout",
    "read_retrieval_folder": "reid_layout",
    "Retrieval": "retrieval",
    "retrieval": "retrieval",
    "write_vehicle_reid": "vehicle_identities",
    "VehicleTruth": "vehicle_truth",
    "read_vehicle_truth": "vehicle_truth",
    "Leak": "leaks",
    "PlateReader": "leaks",
    "ReaderConfig": "leaks",
    "SceneReader": "leaks",
    "UploadReader": "upload_reader",
    "count_macs": "cost",
    "count_params": "cost",
    "edge_macs": "cost",
    "feature_bytes": "cost",
    "Split": "split",
    "SplitPoint": "split",
    "split_points": "split",
    "ResidualBlock": "blocks",
    "residual_blocks": "blocks",
    "remove_blocks": "removal",
    "BNNeck": "reid_model",
    "add_bnneck": "reid_model",
    "build_reid_model": "reid_model",
    "embed": "reid_model",
    "PKBatches": "reid_training",
    "ReidLoss": "reid_training",
    "OpenedAttention": "open_attention",
    "open_attention": "open_attention",
    "SoftMasks": "masks",
    "fold_masks": "folding",
    "Latency": "latency",
    "LatencyConfig": "latency",
    "measure_latency": "latency",
    "PlanLimits": "plan_limits",
    "Plan": "plan",
    "plan": "plan",
    "block_lipschitz": "lipschitz",
    "lipschitz_loss": "lipschitz",
    "make_decoder": "decoders",
    "SurrogateEnsemble": "surrogate",
    "SurrogateSpec": "surrogate",
    "PatrolObjective": "objective",
    "PatrolImportance": "importance",
    "GroupPatrolImportance": "importance",
    "MaskImportance": "mask_importance",
    "PatrolPruner": "pruner",
    "FinetuneConfig": "finetune",
    "finetune": "finetune",
    "recalibrate_batchnorm": "finetune",
    "LearnedMasks": "learned_masks",
    "MaskConfig": "learned_masks",
    "learn_masks": "learned_masks",
    "rebuild_optimizer": "origins",
    "save": "checkpoint",
    "load": "checkpoint",
    "export": "export",
    "Exported": "export",
    "ExportedSplit": "exported",
    "load_exported": "exported",
    "UploadFormat": "packing",
    "Defence": "defences.base",
    "make_defence": "defences",
    "Attack": "attacks.base",
    "FitRecord": "attacks.base",
    "Knowledge": "attacks.base",
    "ImagePrior": "attacks.image_prior",
    "ImagePriorConfig": "attacks.image_prior",
    "InverseNetwork": "attacks.inverse_network",
    "InverseNetworkConfig": "attacks.inverse_network_config",
    "LinearInverse": "attacks.linear_inverse",
    "LinearInverseConfig": "attacks.linear_inverse",
    "QueryFree": "attacks.query_free",
    "QueryFreeConfig": "attacks.query_free_config",
    "RMLE": "attacks.rmle",
    "RMLEConfig": "attacks.rmle",
    "conditional_entropy_bound": "bounds",
    "diagonal_fisher_information": "bounds",
    "jacobian_effective_rank": "jacobian",
    "AuditReport": "audit",
    "audit": "audit",
    "TuneConfig": "tune_settings",
    "TuneResult": "tune_result",
    "TuneTrial": "tune_result",
    "tune": "tune",
}

__all__ = sorted([*_WHERE, "__version__"])

if TYPE_CHECKING:
    from patrol_prune.attacks.base import Attack, FitRecord, Knowledge
    from patrol_prune.attacks.image_prior import ImagePrior, ImagePriorConfig
    from patrol_prune.attacks.inverse_network import InverseNetwork
    from patrol_prune.attacks.inverse_network_config import InverseNetworkConfig
    from patrol_prune.attacks.linear_inverse import LinearInverse, LinearInverseConfig
    from patrol_prune.attacks.query_free import QueryFree
    from patrol_prune.attacks.query_free_config import QueryFreeConfig
    from patrol_prune.attacks.rmle import RMLE, RMLEConfig
    from patrol_prune.audit import AuditReport, audit
    from patrol_prune.blocks import ResidualBlock, residual_blocks
    from patrol_prune.bounds import conditional_entropy_bound, diagonal_fisher_information
    from patrol_prune.checkpoint import load, save
    from patrol_prune.cost import count_macs, count_params, edge_macs, feature_bytes
    from patrol_prune.data import Batches, ImageSet, load_image_folder
    from patrol_prune.decoders import make_decoder
    from patrol_prune.defences import Defence, make_defence
    from patrol_prune.errors import (
        BudgetError,
        CheckpointError,
        InputError,
        MissingPackageError,
        PatrolError,
        RunDirectoryError,
        TrainingError,
        UnmetLimitsError,
        UnsupportedModelError,
    )
    from patrol_prune.export import Exported, export
    from patrol_prune.exported import ExportedSplit, load_exported
    from patrol_prune.finetune import FinetuneConfig, finetune, recalibrate_batchnorm
    from patrol_prune.folding import fold_masks
    from patrol_prune.importance import GroupPatrolImportance, PatrolImportance
    from patrol_prune.jacobian import jacobian_effective_rank
    from patrol_prune.latency import Latency, LatencyConfig, measure_latency
    from patrol_prune.leaks import Leak, PlateReader, ReaderConfig, SceneReader
    from patrol_prune.learned_masks import LearnedMasks, MaskConfig, learn_masks
    from patrol_prune.lipschitz import block_lipschitz, lipschitz_loss
    from patrol_prune.mask_importance import MaskImportance
    from patrol_prune.masks import SoftMasks
    from patrol_prune.objective import PatrolObjective
    from patrol_prune.open_attention import OpenedAttention, open_attention
    from patrol_prune.origins import rebuild_optimizer
    from patrol_prune.packing import UploadFormat
    from patrol_prune.pixels import Normalization
    from patrol_prune.plan import Plan, plan
    from patrol_prune.plan_limits import PlanLimits
    from patrol_prune.pruner import PatrolPruner
    from patrol_prune.regions import PrivateRegions
    from patrol_prune.reid_layout import (
        ReidImage,
        ReidSet,
        read_reid,
        read_retrieval_folder,
    )
    from patrol_prune.reid_model import BNNeck, add_bnneck, build_reid_model, embed
    from patrol_prune.reid_training import PKBatches, ReidLoss
    from patrol_prune.removal import remove_blocks
    from patrol_prune.retrieval import Retrieval, retrieval
    from patrol_prune.split import Split, SplitPoint, split_points
    from patrol_prune.surrogate import SurrogateEnsemble, SurrogateSpec
    from patrol_prune.tune import tune
    from patrol_prune.tune_result import TuneResult, TuneTrial
    from patrol_prune.tune_settings import TuneConfig
    from patrol_prune.upload_reader import UploadReader
    from patrol_prune.vehicle_identities import write_vehicle_reid
    from patrol_prune.vehicle_truth import VehicleTruth, read_vehicle_truth


def __getattr__(name: str) -> Any:
    """Load a public name where it is first used: `pp.edge_macs` does not import the attacks."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """Importing `patrol_prune.plan` would put the module where the function `plan` belongs."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _WHERE and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
