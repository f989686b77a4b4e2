from .batches import DataBatch as DataBatch
from .batches import batches_of as batches_of
from .batches import read_batch as read_batch
from .catalog import catalog as catalog
from .digits import load_digits_split as load_digits_split
from .glyphs import GlyphWorld as GlyphWorld
from .goal_tasks import GoalSet as GoalSet
from .goal_tasks import GoalTask as GoalTask
from .goal_tasks import GoalWorld as GoalWorld
from .label_noise import add_label_noise as add_label_noise
from .loading import load_workload as load_workload
from .mnist1d import MNIST1D as MNIST1D
from .point_clouds import PointClouds as PointClouds
from .point_clouds import load_meshes as load_meshes
from .point_clouds import load_modelnet40_h5 as load_modelnet40_h5
from .point_clouds import load_shapenet_h5 as load_shapenet_h5
from .problem import Problem as Problem
from .problem import problem as problem
from .shapes import ShapeSet as ShapeSet
from .shapes import procedural_shapes as procedural_shapes
from .trajectories import Trajectories as Trajectories
from .workload import Labeled as Labeled
from .workload import Workload as Workload
from .workload import arrays as arrays
from .world import DataWorld as DataWorld

__all__ = [
    "MNIST1D",
    "DataBatch",
    "DataWorld",
    "GlyphWorld",
    "GoalSet",
    "GoalTask",
    "GoalWorld",
    "Labeled",
    "PointClouds",
    "Problem",
    "ShapeSet",
    "Trajectories",
    "Workload",
    "add_label_noise",
    "arrays",
    "batches_of",
    "catalog",
    "load_digits_split",
    "load_meshes",
    "load_modelnet40_h5",
    "load_shapenet_h5",
    "load_workload",
    "problem",
    "procedural_shapes",
    "read_batch",
]
