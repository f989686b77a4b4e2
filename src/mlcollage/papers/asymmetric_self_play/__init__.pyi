from .advantages import gae as gae
from .advantages import standardize_advantages as standardize_advantages
from .autoreset import VectorStep as VectorStep
from .autoreset import VectorSteps as VectorSteps
from .certificate import Certificate as Certificate
from .certificate import certify as certify
from .certificate import coverage_entropy as coverage_entropy
from .checkpoint import Snapshot as Snapshot
from .config import ASPConfig as ASPConfig
from .envs import ASPParallelEnv as ASPParallelEnv
from .envs import ASPVectorEnv as ASPVectorEnv
from .envs import GoalReachingEnv as GoalReachingEnv
from .episode import episode_page as episode_page
from .game import AsymmetricSelfPlay as AsymmetricSelfPlay
from .goals import GoalVerdict as GoalVerdict
from .goals import alice_reward as alice_reward
from .goals import at_goal as at_goal
from .goals import object_rewards as object_rewards
from .goals import success_rate as success_rate
from .goals import time_rewards as time_rewards
from .goals import validate_goal as validate_goal
from .grasp import Grasp25D as Grasp25D
from .grasp_turn import GraspAndTurn as GraspAndTurn
from .gym import GymnasiumWorld as GymnasiumWorld
from .heads import action_logp as action_logp
from .heads import sample_actions as sample_actions
from .holdouts import RobogymState as RobogymState
from .holdouts import block_holdouts as block_holdouts
from .holdouts import disc_holdouts as disc_holdouts
from .holdouts import load_robogym_state as load_robogym_state
from .loss import PPOTerms as PPOTerms
from .loss import abc_loss as abc_loss
from .loss import clip_share as clip_share
from .loss import ppo_loss as ppo_loss
from .mujoco_tabletop import MujocoTabletop as MujocoTabletop
from .mujoco_tabletop import tabletop_holdouts as tabletop_holdouts
from .planar import PlanarPush as PlanarPush
from .policy import SetPolicy as SetPolicy
from .policy import SetValue as SetValue
from .relabel import Demonstrations as Demonstrations
from .relabel import relabel as relabel
from .robogym_rules import GoalCount as GoalCount
from .robogym_rules import GoalCounter as GoalCounter
from .robogym_rules import off_table as off_table
from .robogym_rules import zone_excess as zone_excess
from .rotation import euler_to_quaternion as euler_to_quaternion
from .rotation import parallel_rotations as parallel_rotations
from .rotation import quaternion_conjugate as quaternion_conjugate
from .rotation import quaternion_multiply as quaternion_multiply
from .rotation import rotation_distance as rotation_distance

__all__ = [
    "ASPConfig",
    "ASPParallelEnv",
    "ASPVectorEnv",
    "AsymmetricSelfPlay",
    "Certificate",
    "Demonstrations",
    "GoalCount",
    "GoalCounter",
    "GoalReachingEnv",
    "GoalVerdict",
    "Grasp25D",
    "GraspAndTurn",
    "GymnasiumWorld",
    "MujocoTabletop",
    "PPOTerms",
    "PlanarPush",
    "RobogymState",
    "SetPolicy",
    "SetValue",
    "Snapshot",
    "VectorStep",
    "VectorSteps",
    "abc_loss",
    "action_logp",
    "alice_reward",
    "at_goal",
    "block_holdouts",
    "certify",
    "clip_share",
    "coverage_entropy",
    "disc_holdouts",
    "episode_page",
    "euler_to_quaternion",
    "gae",
    "load_robogym_state",
    "object_rewards",
    "off_table",
    "parallel_rotations",
    "ppo_loss",
    "quaternion_conjugate",
    "quaternion_multiply",
    "relabel",
    "rotation_distance",
    "sample_actions",
    "standardize_advantages",
    "success_rate",
    "tabletop_holdouts",
    "time_rewards",
    "validate_goal",
    "zone_excess",
]
