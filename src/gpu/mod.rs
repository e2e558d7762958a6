//! The GPU executor: the rules as compute shaders, on any vendor's GPU through wgpu.
//!
//! `context` chooses an adapter and opens a device once per process, `pipeline` compiles a kernel's
//! [`shader`](crate::shader) for it, `arena` lays tensors out in windows no longer than a binding may be,
//! `staging` moves arrays between host and device, [`Executor`] runs a step: one dispatch per kernel and
//! window updates every tensor of every group. `vector` has the vectors of methods that take a closure:
//! elementwise operations are recorded without waiting, sums come back as one number per block.
//!
//! It works within the limits that WebGPU guarantees and asks for larger buffers where they are offered.
//! It computes in float32 only; float64 is refused by name. Where the device is lost, memory runs out, no
//! adapter fits, or the process was forked, the error's kind says so; nothing panics.
//!
//! Where the truth lives: a plain parameter ([`ParamInfo::resident`](crate::ParamInfo::resident) false) is
//! uploaded before and written back after every step. A resident one stays on the device: it is uploaded
//! when the host's copy is newer (at first, and after `host_written`) and comes back by `sync`.

mod arena;
mod array;
mod context;
mod executor;
mod passes;
mod pipeline;
mod program;
mod staging;
mod vector;

pub(crate) use array::sum_of;
pub use array::{Array, Norm, clip_norm, synchronize};
pub use context::{DeviceInfo, DeviceRequest, devices};
pub use executor::{Culprit, Executor, Job, Outcome};
pub use passes::{Bounds, CHUNK};
pub use vector::{DeviceVector, VectorHome, VectorSpace};
