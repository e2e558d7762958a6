//! The engine of roptim: optimizers over arrays, fused on the CPU and on any vendor's GPU.
//!
//! A [`rule`] is the mathematics of one optimizer on numbers; [`rules`] is the registry of all of them.
//! An executor ([`cpu`], and `gpu` with that feature) runs a rule over many tensors at once; [`store`]
//! holds the state; [`optimizer`] joins them. Nothing here knows Python or NumPy.
//!
//! | module | what it holds |
//! |---|---|
//! | [`error`] | one error type, one sentence form |
//! | [`hyper`] | hyperparameters: name, default and range as data |
//! | [`real`] | compute and storage types |
//! | `drill` | panics on demand, for tests |
//! | `isa` | instruction sets of loops |
//! | `linear` | sums and matrix products of whole tensors |
//! | [`rule`] | what a rule declares, and the coefficients of a step |
//! | [`rules`] | one file per optimizer; the registry |
//! | [`room`] | lists that there may be no memory for |
//! | [`tensor`] | views of the caller's arrays, slot buffers |
//! | [`store`] | state by parameter, and its serde form |
//! | [`checkpoint`] | the file format: trees of values, strict reader, durable writer |
//! | [`cpu`] | plan, shared loop, private threads, fixed-shape sums |
//! | [`shader`] | the text of a kernel's GPU module |
//! | `gpu` | with that feature: adapters, arenas, one dispatch for all tensors |
//! | [`closure`] | methods that evaluate several times in a step |
//! | [`schedule`] | learning-rate transitions |
//! | [`optimizer`] | a preset with groups, store and executor |

pub mod checkpoint;
pub mod closure;
pub mod cpu;
#[doc(hidden)]
#[doc(hidden)]
pub mod drill;
pub mod error;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod hyper;
mod isa;
mod linear;
pub mod optimizer;
pub mod real;
pub mod room;
pub mod rule;
pub mod rules;
pub mod schedule;
pub mod shader;
pub mod store;
pub mod tensor;

pub use error::{Error, ErrorKind, Result};
pub use hyper::{Hyper, Hypers, Range, Value};
pub use optimizer::{Besides, Guard, Nonfinite, Optimizer, Options};
pub use real::Dtype;
pub use rules::{Preset, REGISTRY};
pub use store::{ParamInfo, StateDict};
pub use tensor::{TensorMut, TensorRef};

#[cfg(not(target_endian = "little"))]
compile_error!("roptim supports little-endian machines: state is kept and saved in that order");
