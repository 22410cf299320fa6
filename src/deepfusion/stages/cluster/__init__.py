# SPDX-License-Identifier: Apache-2.0
"""Phase I: devices grouped into knowledge domains (method, section 5)."""

from deepfusion.stages.cluster.base import Clustering, clusterings, describe, similarity, similarity_margin
from deepfusion.stages.cluster.kmeans import KMeans, RandomClusters

__all__ = ["Clustering", "KMeans", "RandomClusters", "clusterings", "describe", "similarity", "similarity_margin"]
