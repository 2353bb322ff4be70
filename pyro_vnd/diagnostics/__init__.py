"""Predictions scored by width, posteriors in ArviZ, figures.

Names are imported when they are first used, and what they need with them: the extra `diagnostics`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_vnd.diagnostics.metrics.calibration import fit_temperature as fit_temperature
    from pyro_vnd.diagnostics.metrics.calibration import scale_temperature as scale_temperature
    from pyro_vnd.diagnostics.metrics.cascades import evaluate_cascade as evaluate_cascade
    from pyro_vnd.diagnostics.metrics.choose_width import smallest_width as smallest_width
    from pyro_vnd.diagnostics.metrics.evaluation import evaluate as evaluate
    from pyro_vnd.diagnostics.metrics.evaluation import net_cost as net_cost
    from pyro_vnd.diagnostics.metrics.generative import generative_metrics as generative_metrics
    from pyro_vnd.diagnostics.metrics.lengths import evaluate_lengths as evaluate_lengths
    from pyro_vnd.diagnostics.metrics.ood import ood_metrics as ood_metrics
    from pyro_vnd.diagnostics.metrics.predictive import classification_metrics as classification_metrics
    from pyro_vnd.diagnostics.metrics.prefixes import evaluate_prefixes as evaluate_prefixes
    from pyro_vnd.diagnostics.metrics.widths import evaluate_learned as evaluate_learned
    from pyro_vnd.diagnostics.metrics.widths import evaluate_widths as evaluate_widths
    from pyro_vnd.diagnostics.metrics.widths import loo_widths as loo_widths
    from pyro_vnd.diagnostics.plots.fits import plot_elbo as plot_elbo
    from pyro_vnd.diagnostics.plots.fits import plot_ranks as plot_ranks
    from pyro_vnd.diagnostics.plots.images import plot_prefixes as plot_prefixes
    from pyro_vnd.diagnostics.plots.images import plot_samples as plot_samples
    from pyro_vnd.diagnostics.plots.images import plot_traversals as plot_traversals
    from pyro_vnd.diagnostics.plots.laws import plot_keep_probs as plot_keep_probs
    from pyro_vnd.diagnostics.plots.laws import plot_laws as plot_laws
    from pyro_vnd.diagnostics.plots.laws import plot_length_posterior as plot_length_posterior
    from pyro_vnd.diagnostics.plots.lengths import plot_lengths as plot_lengths
    from pyro_vnd.diagnostics.plots.lengths import plot_sorted_by_length as plot_sorted_by_length
    from pyro_vnd.diagnostics.plots.prefixes import plot_class_lengths as plot_class_lengths
    from pyro_vnd.diagnostics.plots.prefixes import plot_rate_distortion as plot_rate_distortion
    from pyro_vnd.diagnostics.plots.widths import plot_ood as plot_ood
    from pyro_vnd.diagnostics.plots.widths import plot_reliability as plot_reliability
    from pyro_vnd.diagnostics.plots.widths import plot_widths as plot_widths
    from pyro_vnd.diagnostics.posterior.khat import khat as khat
    from pyro_vnd.diagnostics.posterior.khat import khat_by_row as khat_by_row
    from pyro_vnd.diagnostics.posterior.khat import resample as resample
    from pyro_vnd.diagnostics.posterior.lengths import length_posterior as length_posterior
    from pyro_vnd.diagnostics.posterior.loo import compare as compare
    from pyro_vnd.diagnostics.posterior.loo import loo as loo
    from pyro_vnd.diagnostics.posterior.sbc import rank_uniformity as rank_uniformity
    from pyro_vnd.diagnostics.posterior.sbc import sbc as sbc
    from pyro_vnd.diagnostics.posterior.summary import summary as summary
    from pyro_vnd.diagnostics.posterior.to_arviz import to_arviz as to_arviz

_NAMES = {
    "metrics.calibration": ("fit_temperature", "scale_temperature"),
    "metrics.cascades": ("evaluate_cascade",),
    "metrics.evaluation": ("evaluate", "net_cost"),
    "metrics.generative": ("generative_metrics",),
    "metrics.lengths": ("evaluate_lengths",),
    "metrics.ood": ("ood_metrics",),
    "metrics.predictive": ("classification_metrics",),
    "metrics.prefixes": ("evaluate_prefixes",),
    "metrics.choose_width": ("smallest_width",),
    "metrics.widths": ("evaluate_learned", "evaluate_widths", "loo_widths"),
    "plots.fits": ("plot_elbo", "plot_ranks"),
    "plots.images": ("plot_prefixes", "plot_samples", "plot_traversals"),
    "plots.laws": ("plot_keep_probs", "plot_laws", "plot_length_posterior"),
    "plots.lengths": ("plot_lengths", "plot_sorted_by_length"),
    "plots.prefixes": ("plot_class_lengths", "plot_rate_distortion"),
    "plots.widths": ("plot_ood", "plot_reliability", "plot_widths"),
    "posterior.khat": ("khat", "khat_by_row", "resample"),
    "posterior.lengths": ("length_posterior",),
    "posterior.loo": ("compare", "loo"),
    "posterior.sbc": ("rank_uniformity", "sbc"),
    "posterior.summary": ("summary",),
    "posterior.to_arviz": ("to_arviz",),
}
_MODULES = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names}
_EXTRA = {"arviz", "arviz_stats", "h5netcdf", "h5py", "matplotlib", "pandas", "torchmetrics", "xarray"}

if not TYPE_CHECKING:  # a checker, which has the imports above, would take any name for one that is there
    __all__ = sorted(_MODULES)

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            value = getattr(import_module(_MODULES[name]), name)
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing not in _EXTRA:
                raise
            advice = 'pip install "pyro-vnd[diagnostics]"'
            raise ImportError(f"{__name__}.{name} needs the package {missing!r}: {advice}", name=missing) from error
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
