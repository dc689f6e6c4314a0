"""What other libraries say of the same features: writes tests/golden/metrics.json, which test_metrics.py compares with.

Their packages are no dependencies of the tests. To run it again, in an environment of its own:

    pip install torch torchvision torch-fidelity clean-fid pytorch-fid torchmetrics prdc
    PYTHONPATH=. python tests/train/metrics_peers.py
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics.json"
COUNT, DIM = 400, 24


def features(kind: str) -> np.ndarray:
    """Features [400,24] of "generated" and "reference" images, float64: skewed, correlated, not zero-mean."""
    random = np.random.RandomState({"generated": 0, "reference": 1}[kind])
    mixing = np.random.RandomState(2).randn(DIM, DIM) / np.sqrt(DIM)
    base = np.abs(random.randn(COUNT, DIM)) ** 1.5 @ mixing
    return base * 0.9 + 0.1 if kind == "generated" else base


def inception_features() -> dict[str, np.ndarray]:
    """Every 64th feature of two images by torch-fidelity's network with the stand-in's weights: [2,32]."""
    from feature_networks import inception_tensors, pytorch_fid_names, sample_images
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(pytorch_fid_names(inception_tensors()), file.name)
        network = FeatureExtractorInceptionV3("stand-in", ["2048"], feature_extractor_weights_path=file.name)
    return {"torch-fidelity": network(sample_images())[0][:, ::64].numpy()}


def main() -> None:
    """Compute and write everything."""
    import prdc
    from cleanfid import fid as cleanfid
    from pytorch_fid import fid_score
    from torch_fidelity import metric_fid, metric_kid, metric_prc
    from torchmetrics.image import fid as torchmetrics_fid
    from torchmetrics.image import kid as torchmetrics_kid

    x, y = features("generated"), features("reference")
    tx, ty = torch.from_numpy(x), torch.from_numpy(y)
    statistics = [(values.mean(axis=0), np.cov(values, rowvar=False)) for values in (x, y)]
    (mu_x, sigma_x), (mu_y, sigma_y) = statistics
    dicts = [{"mu": mu, "sigma": sigma} for mu, sigma in statistics]
    tensors = [torch.from_numpy(value) for pair in statistics for value in pair]
    kid = metric_kid.kid_features_to_metric(tx, ty, kid_subsets=1, kid_subset_size=COUNT, verbose=False)
    prc = metric_prc.prc_features_to_metric(tx, ty, prc_neighborhood=3, verbose=False)
    k3, k5 = (prdc.compute_prdc(y, x, nearest_k=k) for k in (3, 5))
    result = {
        "fd": {
            "torch-fidelity": metric_fid.fid_statistics_to_metric(*dicts, verbose=False)[metric_fid.KEY_METRIC_FID],
            "clean-fid": cleanfid.frechet_distance(mu_x, sigma_x, mu_y, sigma_y),
            "pytorch-fid": fid_score.calculate_frechet_distance(mu_x, sigma_x, mu_y, sigma_y),
            "torchmetrics": torchmetrics_fid._compute_fid(*tensors),
        },
        "kid": {
            "torch-fidelity": kid[metric_kid.KEY_METRIC_KID_MEAN],
            "clean-fid": cleanfid.kernel_distance(x, y, num_subsets=1, max_subset_size=COUNT),
            "torchmetrics": torchmetrics_kid.poly_mmd(tx, ty, degree=3, gamma=None, coef=1.0),
        },
        "precision": {"torch-fidelity": prc[metric_prc.KEY_METRIC_PRECISION], "prdc": k3["precision"]},
        "recall": {"torch-fidelity": prc[metric_prc.KEY_METRIC_RECALL], "prdc": k3["recall"]},
        "density": {"prdc": k5["density"]},
        "coverage": {"prdc": k5["coverage"]},
    }
    result["inception"] = inception_features()
    values = {
        metric: {peer: np.asarray(value, np.float64).tolist() for peer, value in peers.items()}
        for metric, peers in result.items()
    }
    packages = ("torch-fidelity", "clean-fid", "pytorch-fid", "torchmetrics", "prdc")
    versions = {name: version(name) for name in packages}
    GOLDEN.write_text(json.dumps({"versions": versions, **values}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
