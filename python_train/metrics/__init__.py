"""Quality of generated images: FID and its kin, KID, precision and recall, density and coverage, from one feature pass.

    extract = feature_extractor("efflite0")
    score(extract(generated), extract(real))["kid"]

The commands are ``python -m python_train.metrics ref | calc | gen``.
"""

from python_train.metrics.compare import ReferenceFeatures, estimate_kid, measure, score
from python_train.metrics.extractors import FeatureExtractor, feature_extractor

__all__ = ["FeatureExtractor", "ReferenceFeatures", "estimate_kid", "feature_extractor", "measure", "score"]
