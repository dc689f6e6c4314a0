"""Power-function EMA and its post-hoc reconstruction (specification section 5, Eqs. 121 to 151).

`PowerEMA` tracks averages in anybody's training loop and saves them; `reconstruct` makes averages of other lengths of
the files. `profiles` has the formulae, `fit` the least-squares problem and its errors, `stored` the files, `stream` the
sums, `output` what is written, `reconstruction` all of it together.
"""

from edm2ext.phema.fit import FITS, ROUNDING, Fit, Target, fit, solve_coefficients
from edm2ext.phema.power_ema import PowerEMA
from edm2ext.phema.profiles import (
    MAX_SIGMA_REL,
    SHAPES,
    gamma_to_sigma_rel,
    parse_sigma_rel_list,
    power_beta,
    profile_product,
    sigma_rel_to_gamma,
)
from edm2ext.phema.reconstruction import Quality, Reconstruction, reconstruct
from edm2ext.phema.stored import STORAGES, StoredAverage, open_average, save_average

__all__ = [
    "FITS",
    "MAX_SIGMA_REL",
    "ROUNDING",
    "SHAPES",
    "STORAGES",
    "Fit",
    "PowerEMA",
    "Quality",
    "Reconstruction",
    "StoredAverage",
    "Target",
    "fit",
    "gamma_to_sigma_rel",
    "open_average",
    "parse_sigma_rel_list",
    "power_beta",
    "profile_product",
    "reconstruct",
    "save_average",
    "sigma_rel_to_gamma",
    "solve_coefficients",
]
