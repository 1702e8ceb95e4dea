"""Settings of the explainers that take tens of forwards by default: a few, for tests that judge something else."""

from regions import quarters

QUICK = {
    "fgvis": {"n_iterations": 4},
    "smoothgrad": {"n_samples": 2},
    "integrated-gradients": {"n_steps": 2},
    "blur-ig": {"n_steps": 2, "max_sigma": 2.0},
    "guided-ig": {"n_steps": 2},
    "xrai": {"n_steps": 2, "regions": quarters},
    "occlusion": {"window": 8, "stride": 8},
    "rise": {"n_masks": 4},
    "d-rise": {"n_masks": 4},
    "lime": {"n_samples": 8, "feature_mask": 4},
    "meaningful-perturbation": {"n_iterations": 2, "initial_mask": "random"},
    **{name: {"feature_mask": 2} for name in ("feature-ablation", "feature-permutation")},
    "shapley-values": {"feature_mask": 2, "baseline": "mean"},
    **{
        name: {"feature_mask": 2, "n_samples": 16, "baseline": "mean"}
        for name in ("kernel-shap", "shapley-value-sampling")
    },
    **{"hsic": {"feature_mask": 2, "n_samples": 8}, "sobol": {"feature_mask": 2, "n_designs": 2}},
    "extremal-perturbation": {"n_iterations": 2, "sigma": 6.0, "step": 3},
    **{"ss-cam": {"n_samples": 2}, "is-cam": {"n_steps": 2}},
    **{"smooth-grad-cam++": {"n_samples": 2}, "sess": {"n_scales": 2}},
}
