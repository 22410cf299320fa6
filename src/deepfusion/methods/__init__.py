# SPDX-License-Identifier: Apache-2.0
"""The federated methods; importing this package registers all of them."""

from deepfusion.methods.base import Method, TargetOptions, methods
from deepfusion.methods.centralised import Centralised
from deepfusion.methods.deepfusion import DeepFusion, FedMktOneShot, OfaKd
from deepfusion.methods.fedavg import FedAvg
from deepfusion.methods.fedjets import FedJets
from deepfusion.methods.fedmkt import FedMkt
from deepfusion.methods.hfedmoe import HFedMoE

__all__ = [
    "Centralised",
    "DeepFusion",
    "FedAvg",
    "FedJets",
    "FedMkt",
    "FedMktOneShot",
    "HFedMoE",
    "Method",
    "OfaKd",
    "TargetOptions",
    "methods",
]
