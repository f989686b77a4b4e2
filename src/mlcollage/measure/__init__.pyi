from .attention import AttentionDistance as AttentionDistance
from .attention import AttentionTap as AttentionTap
from .attention import TokenGrid as TokenGrid
from .attention import attention_distance as attention_distance
from .attention import map_distance as map_distance
from .attention import token_grid as token_grid
from .calibration import CalibrationCurve as CalibrationCurve
from .calibration import MonteCarlo as MonteCarlo
from .calibration import accuracy as accuracy
from .calibration import agreement as agreement
from .calibration import auroc_ood as auroc_ood
from .calibration import brier as brier
from .calibration import calibration_curve as calibration_curve
from .calibration import confidence_gap as confidence_gap
from .calibration import ece as ece
from .calibration import jackknife as jackknife
from .calibration import mutual_information as mutual_information
from .calibration import nll as nll
from .calibration import predictive_entropy as predictive_entropy
from .calibration import total_variation as total_variation
from .cca import CCAFactor as CCAFactor
from .cca import CCAResult as CCAResult
from .cca import cca as cca
from .cca import pwcca as pwcca
from .cca import svcca as svcca
from .chamfer import Chamfer as Chamfer
from .chamfer import chamfer_distance as chamfer_distance
from .chamfer import nearest_neighbors as nearest_neighbors
from .cka import RBF as RBF
from .cka import CKADifference as CKADifference
from .cka import CKAResult as CKAResult
from .cka import MinibatchCKA as MinibatchCKA
from .cka import cka as cka
from .class_means import ClassMeans as ClassMeans
from .dimensionality import dimensionality as dimensionality
from .dimensionality import effective_rank as effective_rank
from .dimensionality import participation_ratio as participation_ratio
from .dimensionality import spectrum as spectrum
from .few_labels import few_shot_split as few_shot_split
from .few_labels import semi_supervised_split as semi_supervised_split
from .fisher import fisher_sqnorm as fisher_sqnorm
from .fisher import fisher_trace as fisher_trace
from .fisher import sample_labels as sample_labels
from .grad_norms import GhostNorms as GhostNorms
from .grad_norms import per_example_grad_sqnorm as per_example_grad_sqnorm
from .hessian import hessian_eigenvalues as hessian_eigenvalues
from .hessian import hessian_trace as hessian_trace
from .hessian import hessian_vector_product as hessian_vector_product
from .knn import KNNProbe as KNNProbe
from .knn import knn_probe as knn_probe
from .layer_tap import LayerTap as LayerTap
from .layer_tap import layers_of as layers_of
from .localization import TokenLocalization as TokenLocalization
from .localization import token_localization as token_localization
from .localization import token_probes as token_probes
from .probes import RidgeProbe as RidgeProbe
from .probes import layer_probes as layer_probes
from .probes import ridge_probe as ridge_probe
from .rdm import rdm as rdm
from .rdm import rdm_similarity as rdm_similarity
from .receptive_field import ReceptiveField as ReceptiveField
from .receptive_field import effective_receptive_field as effective_receptive_field
from .registration import ICPResult as ICPResult
from .registration import all_poses as all_poses
from .registration import icp as icp
from .registration import principal_frame as principal_frame
from .registration import registration_rmse as registration_rmse
from .representation import as_samples as as_samples
from .representation import centered_matrix as centered_matrix
from .rigid import Procrustes as Procrustes
from .rigid import RigidTransform as RigidTransform
from .rigid import mean_rotation as mean_rotation
from .rigid import procrustes as procrustes
from .rigid import random_rotation as random_rotation
from .rigid import rotation_angle as rotation_angle
from .rigid import symmetric_angle as symmetric_angle
from .skips import ResidualSum as ResidualSum
from .skips import SkipRatios as SkipRatios
from .skips import remove_skip as remove_skip
from .skips import residual_sums as residual_sums
from .skips import skip_ratio as skip_ratio
from .trace import TraceResult as TraceResult
from .units import LayerUnits as LayerUnits
from .units import UnitAxes as UnitAxes
from .units import unit_axes as unit_axes

__all__ = [
    "RBF",
    "AttentionDistance",
    "AttentionTap",
    "CCAFactor",
    "CCAResult",
    "CKADifference",
    "CKAResult",
    "CalibrationCurve",
    "Chamfer",
    "ClassMeans",
    "GhostNorms",
    "ICPResult",
    "KNNProbe",
    "LayerTap",
    "LayerUnits",
    "MinibatchCKA",
    "MonteCarlo",
    "Procrustes",
    "ReceptiveField",
    "ResidualSum",
    "RidgeProbe",
    "RigidTransform",
    "SkipRatios",
    "TokenGrid",
    "TokenLocalization",
    "TraceResult",
    "UnitAxes",
    "accuracy",
    "agreement",
    "all_poses",
    "as_samples",
    "attention_distance",
    "auroc_ood",
    "brier",
    "calibration_curve",
    "cca",
    "centered_matrix",
    "chamfer_distance",
    "cka",
    "confidence_gap",
    "dimensionality",
    "ece",
    "effective_rank",
    "effective_receptive_field",
    "few_shot_split",
    "fisher_sqnorm",
    "fisher_trace",
    "hessian_eigenvalues",
    "hessian_trace",
    "hessian_vector_product",
    "icp",
    "jackknife",
    "knn_probe",
    "layer_probes",
    "layers_of",
    "map_distance",
    "mean_rotation",
    "mutual_information",
    "nearest_neighbors",
    "nll",
    "participation_ratio",
    "per_example_grad_sqnorm",
    "predictive_entropy",
    "principal_frame",
    "procrustes",
    "pwcca",
    "random_rotation",
    "rdm",
    "rdm_similarity",
    "registration_rmse",
    "remove_skip",
    "residual_sums",
    "ridge_probe",
    "rotation_angle",
    "sample_labels",
    "semi_supervised_split",
    "skip_ratio",
    "spectrum",
    "svcca",
    "symmetric_angle",
    "token_grid",
    "token_localization",
    "token_probes",
    "total_variation",
    "unit_axes",
]
