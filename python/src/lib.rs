//! `roptim._roptim`: the compiled half of the Python package. Exports only; the package around it holds
//! classes, docstrings and types.

mod arrays;
mod clip;
mod device_array;
mod devices;
mod drill;
mod engine;
mod errors;
mod files;
mod forks;
mod load;
mod overlap;
mod parameter;
mod registry;
mod schedules;
mod series;
mod shared;
mod sparse;
mod threads;
mod values;

use pyo3::prelude::*;

#[cfg(not(panic = "unwind"))]
compile_error!("a panic must unwind: it becomes an InternalError, and the interpreter lives on");

#[pymodule]
mod _roptim {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::clip::{clip_factor, norm};
    #[pymodule_export]
    use crate::device_array::{DeviceArray, DeviceNorm, clip_norm_on_device, synchronize};
    #[pymodule_export]
    use crate::devices::devices;
    #[pymodule_export]
    use crate::drill::_drill;
    #[pymodule_export]
    use crate::engine::Engine;
    #[pymodule_export]
    use crate::files::{dumps, from_json, load, loads, save, to_json, write_file};
    #[pymodule_export]
    use crate::forks::{after_fork, before_fork};
    #[pymodule_export]
    use crate::load::{Loading, match_parameters};
    #[pymodule_export]
    use crate::parameter::ParameterBase;
    #[pymodule_export]
    use crate::registry::registry;
    #[pymodule_export]
    use crate::schedules::{
        Schedule, anneal_share, chain_closed, chain_next, cycle_scale, half_cosine, one_cycle, plateau_observe,
        plateau_reduced, triangle,
    };

    #[pymodule_export]
    use crate::series::{Series, Snapshot, examine};
    #[pymodule_export]
    use crate::threads::limit_threads;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
