# SPDX-License-Identifier: Apache-2.0
"""Phase I: domain embeddings (method, section 4)."""

from deepfusion.stages.embed.base import Embedding, embeddings
from deepfusion.stages.embed.encoder import FrozenEncoder
from deepfusion.stages.embed.probe import ServerProbe
from deepfusion.stages.embed.tfidf import HashedTfidf

__all__ = ["Embedding", "FrozenEncoder", "HashedTfidf", "ServerProbe", "embeddings"]
