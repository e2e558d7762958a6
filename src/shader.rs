//! The text of a kernel's GPU module.
//!
//! A module is the shared text, the rule's text and a few lines that depend on the kernel alone: the
//! bindings, the coefficient row, and the call of the kernel on one vec4 of every array. No preprocessor
//! is involved, and no GPU: `cargo test` validates every module without one.
//!
//! | binding | what | access |
//! |---|---|---|
//! | 0 | parameters, one window, `array<vec4<f32>>` | read, write |
//! | 1 | gradients, the same window | read |
//! | 2 | chunks of the window | read |
//! | 3 | coefficient rows of the step, [`ROW_WORDS`] words each | read |
//! | 4 + k | the kernel's slot k, the same window | read, write |

use std::fmt::Write;

use crate::rule::{KernelFacts, MAX_COEFFICIENTS};
use crate::rules::RuleId;

/// Twin of the numbers.
pub const REAL: &str = include_str!("../shaders/shared/real.wgsl");
/// Twin of what several rules share.
pub const MOMENTS: &str = include_str!("../shaders/shared/moments.wgsl");
/// Twin of the loop.
pub const RUN: &str = include_str!("../shaders/shared/run.wgsl");

/// Numbers of two f32.
pub const DOUBLE: &str = include_str!("../shaders/shared/double.wgsl");
/// Operations on whole vectors.
pub const VECTOR: &str = include_str!("../shaders/shared/vector.wgsl");
/// Names of the entry points of [`vector_module`].
pub const VECTOR_ENTRY_POINTS: [&str; 4] = ["add_scaled", "scale", "sum", "largest"];
/// Words of the struct `Operation` of [`vector_module`].
pub const OPERATION_WORDS: usize = 6;

/// Words of the struct `Frame`.
pub const FRAME_WORDS: usize = 5;
/// Words of a coefficient row: the frame and as many coefficients as a kernel may have.
pub const ROW_WORDS: usize = FRAME_WORDS + MAX_COEFFICIENTS;
/// Words of an entry of the chunk table.
pub const CHUNK_WORDS: usize = 3;
/// Binding of the first slot.
pub const FIRST_SLOT_BINDING: u32 = 4;
/// Name of every module's entry point.
pub const ENTRY_POINT: &str = "step";
/// The bit of `Frame.switches` that turns L2 decay on.
pub const L2: u32 = 1;
/// The bit of `Frame.switches` that stores subnormal slots as zero.
pub const FLUSH_SUBNORMALS: u32 = 2;
/// The bit of `Frame.switches` that bounds gradients.
pub const BOUNDED: u32 = 4;

/// The WGSL module of the operations on vectors.
pub fn vector_module() -> String {
    [DOUBLE, VECTOR].join("\n")
}

/// The WGSL module of one kernel of a rule.
pub fn module(rule: RuleId, kernel: &KernelFacts) -> String {
    let unused = MAX_COEFFICIENTS - kernel.coefficients.len();
    let padding = if unused == 0 { String::new() } else { format!(" unused: array<f32, {unused}>,") };
    let mut text = [REAL, MOMENTS, RUN, rule.shader().unwrap_or_default()].join("\n");
    let (mut bindings, mut load, mut pass, mut store) = (String::new(), String::new(), String::new(), String::new());
    for k in 0..kernel.slots.len() {
        let binding = FIRST_SLOT_BINDING + k as u32;
        // Writing to a String cannot fail.
        let _ = writeln!(bindings, "@group(0) @binding({binding}) var<storage, read_write> slot{k}: array<vec4<f32>>;");
        let _ = writeln!(load, "    var s{k} = slot{k}[at];");
        let _ = write!(pass, ", &s{k}");
        let _ = writeln!(store, "    slot{k}[at] = stored(row.frame, s{k}, inside);");
    }
    let entry = kernel.entry;
    let _ = write!(
        text,
        "
// Generated for the kernel {entry}.
struct Row {{ frame: Frame, c: Scalars,{padding} }}
@group(0) @binding(0) var<storage, read_write> parameters: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> gradients: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> chunks: array<Chunk>;
@group(0) @binding(3) var<storage, read> rows: array<Row>;
{bindings}
fn update(row: Row, at: u32, inside: vec4<bool>) {{
    let p = parameters[at];
    let g = prepared(row.frame, p, gradients[at]);
{load}    let theta = {entry}(row.c, p * row.frame.shrink, g{pass});
    parameters[at] = select(vec4<f32>(0.0), theta, inside);
{store}}}
"
    );
    text
}
