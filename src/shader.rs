//! The texts of GPU modules.
//!
//! A module is shared texts, the rule's text and a few lines that depend on kernel and storage types: the
//! bindings, the coefficient row, and the call of the kernel on one vec4 of every array. No preprocessor
//! is involved, and no GPU: `cargo test` validates every module without one.
//!
//! | binding of [`update`] | what | access |
//! |---|---|---|
//! | 0 | parameters, one window, four to an element | read, write |
//! | 1 | gradients | read |
//! | 2 | chunks of the window | read |
//! | 3 | control words of the step and its coefficient rows, [`ROW_WORDS`] words each | read |
//! | 4 + k | the kernel's slot k, the same window as the parameters | read, write |
//!
//! [`tensors`] is a module with the passes of a tensor rule. Slots and gradients have windows of their own there:
//!
//! | binding of [`tensors`] | what | access |
//! |---|---|---|
//! | 0, 1 | parameters, gradients, four to an element | read, write; read |
//! | 2 | tensors of the window, [`TENSOR_WORDS`] words each | read |
//! | 3 | as of [`update`], a row for each tensor | read |
//! | 4 + k | slot k | read, write |
//! | behind them | areas of working memory | read, write |
//!
//! [`measure`] and [`decide`] are the passes of the guard before it, [`sum_into`] and [`scale`] work on gradients.

use std::fmt::Write;

use crate::real::Dtype;
use crate::rule::{KernelFacts, MAX_AREAS, MAX_COEFFICIENTS, MAX_SLOTS, MAX_UNITS, ProgramPass};
use crate::rules::{RuleId, TensorRuleId};

/// Twin of the numbers.
pub const REAL: &str = include_str!("../shaders/shared/real.wgsl");
/// Twin of what several rules share.
pub const MOMENTS: &str = include_str!("../shaders/shared/moments.wgsl");
/// Storage types.
pub const STORAGE: &str = include_str!("../shaders/shared/storage.wgsl");
/// Numbers of 48 bits.
pub const DOUBLE: &str = include_str!("../shaders/shared/double.wgsl");
/// Chunks and control words.
pub const STEP: &str = include_str!("../shaders/shared/step.wgsl");
/// What happens to every element around the rule.
pub const FRAME: &str = include_str!("../shaders/shared/frame.wgsl");
/// What the passes of a tensor rule share.
pub const TENSOR: &str = include_str!("../shaders/shared/tensor.wgsl");
/// Twin of the loop.
pub const RUN: &str = include_str!("../shaders/shared/run.wgsl");
/// What the passes of the guard share.
pub const GUARD: &str = include_str!("../shaders/shared/guard.wgsl");
/// Its first pass.
pub const MEASURE: &str = include_str!("../shaders/shared/measure.wgsl");
/// Its second pass.
pub const DECIDE: &str = include_str!("../shaders/shared/decide.wgsl");
/// Gradients added up, and scaled in place.
pub const GRADIENTS: &str = include_str!("../shaders/shared/gradients.wgsl");

/// Operations on whole vectors.
pub const VECTOR: &str = include_str!("../shaders/shared/vector.wgsl");
/// Names of the entry points of [`vector_module`].
pub const VECTOR_ENTRY_POINTS: [&str; 4] = ["add_scaled", "scale", "sum", "largest"];
/// Words of the struct `Operation` of [`vector_module`].
pub const OPERATION_WORDS: usize = 6;

/// Words of the struct `Control`.
pub const CONTROL_WORDS: usize = 16;
/// Words of the struct `Frame`.
pub const FRAME_WORDS: usize = 4;
/// Words of a coefficient row: the frame and as many coefficients as a kernel may have.
pub const ROW_WORDS: usize = FRAME_WORDS + MAX_COEFFICIENTS;
/// Words before the entries of the chunk table.
pub const TABLE_WORDS: usize = 4;
/// Words of an entry of the chunk table.
pub const CHUNK_WORDS: usize = 4;
/// Words of the struct `Partial`.
pub const PARTIAL_WORDS: usize = 4;
/// Words before the entries of the table of tensors.
pub const TENSORS_WORDS: usize = 4;
/// Words of the struct `Tensor` before its arrays.
pub const TENSOR_HEAD_WORDS: usize = 8;
/// Words of an entry of the table of tensors.
pub const TENSOR_WORDS: usize = TENSOR_HEAD_WORDS + MAX_SLOTS + MAX_AREAS + MAX_UNITS;
/// Binding of the first slot.
pub const FIRST_SLOT_BINDING: u32 = 4;
/// The bit of `Frame.switches` that turns L2 decay on.
pub const L2: u32 = 1;
/// The bit of `Frame.switches` that stores subnormal slots as zero.
pub const FLUSH_SUBNORMALS: u32 = 2;
/// The bit of `Control.switches` that bounds gradients.
pub const BOUNDED: u32 = 1;
/// The bit of `Control.switches` that asks for the norm.
pub const CLIPS_NORM: u32 = 2;
/// The bit of `Control.switches` that leaves updates out where a gradient is not finite.
pub const SKIPS: u32 = 4;
/// The bit of `Control.found` and `Partial.found` for infinities.
pub const HAS_INFINITY: u32 = 1;
/// The bit of `Control.found` and `Partial.found` for NaN.
pub const HAS_NAN: u32 = 2;
/// `Control.max_exponent` of an infinite bound.
pub const UNBOUNDED_EXPONENT: i32 = 1000;

/// The WGSL module of the operations on vectors.
pub fn vector_module() -> String {
    [DOUBLE, VECTOR].join("\n")
}

/// A module: its text, its entry point and whether each of its bindings is written to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// WGSL.
    pub text: String,
    /// Name of the entry point.
    pub entry: &'static str,
    /// By binding: whether it is written to.
    pub written: Vec<bool>,
}

/// The WGSL type of four stored elements, and the suffix of the functions that read and write them.
fn storage(dtype: Dtype) -> (&'static str, &'static str) {
    match dtype {
        Dtype::F16 => ("vec2<u32>", "f16"),
        Dtype::BF16 => ("vec2<u32>", "bf16"),
        _ => ("vec4<f32>", "f32"),
    }
}

fn binding(index: usize, access: &str, name: &str, ty: &str) -> String {
    format!("@group(0) @binding({index}) var<storage, {access}> {name}: {ty};\n")
}

/// The struct `Row` around the scalars of a rule, and its control words.
fn row(coefficients: usize) -> String {
    let unused = MAX_COEFFICIENTS - coefficients;
    let padding = if unused == 0 { String::new() } else { format!(" unused: array<f32, {unused}>,") };
    format!(
        "struct Row {{ frame: Frame, c: Scalars,{padding} }}\nstruct Work {{ control: Control, rows: array<Row> }}\n"
    )
}

/// One update by a rule's kernel of parameters and gradients that store these types.
pub fn update(rule: RuleId, kernel: &KernelFacts, parameter: Dtype, gradient: Dtype) -> Module {
    let ((parameter, p), (gradient, g)) = (storage(parameter), storage(gradient));
    let (mut slots, mut load, mut pass, mut store) = (String::new(), String::new(), String::new(), String::new());
    for k in 0..kernel.slots.len() {
        let slot = binding(FIRST_SLOT_BINDING as usize + k, "read_write", &format!("slot{k}"), "array<vec4<f32>>");
        slots.push_str(&slot);
        // Writing to a String cannot fail.
        let _ = writeln!(load, "    var s{k} = slot{k}[at];");
        let _ = write!(pass, ", &s{k}");
        let _ = writeln!(store, "    slot{k}[at] = stored(row.frame, s{k}, inside);");
    }
    let entry = kernel.entry;
    let generated = format!(
        "
// Generated for the kernel {entry}.
{}{}{}{}{}{slots}
fn update(row: Row, control: Control, at: u32, gradient_at: u32, inside: vec4<bool>) {{
    let p = from_{p}(parameters[at]);
    let g = prepared(row.frame, control, p, from_{g}(gradients[gradient_at]));
{load}    let theta = {entry}(row.c, p * row.frame.shrink, g{pass});
    parameters[at] = to_{p}(select(vec4<f32>(0.0), theta, inside));
{store}}}
",
        row(kernel.coefficients.len()),
        binding(0, "read_write", "parameters", &format!("array<{parameter}>")),
        binding(1, "read", "gradients", &format!("array<{gradient}>")),
        binding(2, "read", "table", "Table"),
        binding(3, "read", "work", "Work"),
    );
    let text = [REAL, MOMENTS, STORAGE, STEP, FRAME, RUN, rule.shader().unwrap_or_default(), &generated].join("\n");
    let mut written = vec![true, false, false, false];
    written.resize(FIRST_SLOT_BINDING as usize + kernel.slots.len(), true);
    Module { text, entry: "step", written }
}

/// A tensor rule's module for parameters and gradients that store these types, entered at one of its passes.
pub fn tensors(rule: TensorRuleId, pass: &ProgramPass, parameter: Dtype, gradient: Dtype) -> Module {
    let program = rule.program();
    let mut constants = String::new();
    for (name, value) in program.constants {
        // Writing to a String cannot fail.
        let _ = writeln!(constants, "const {name}: u32 = {value}u;");
    }
    let slots = rule.declaration().slots.iter().map(|slot| (slot.name, "array<f32>"));
    let areas = program.areas.iter().map(|area| (area.name, "array<u32>"));
    let memory: Vec<String> = (FIRST_SLOT_BINDING as usize..)
        .zip(slots.chain(areas))
        .map(|(index, (name, ty))| binding(index, "read_write", name, ty))
        .collect();
    let ((parameter, p), (gradient, g)) = (storage(parameter), storage(gradient));
    let element = match g {
        "f32" => "gradients[at / 4u][at % 4u]".to_owned(),
        g => format!("from_{g}(vec2<u32>(gradients[at / 4u][at / 2u % 2u] >> (16u * (at % 2u)) & 0xffffu, 0u)).x"),
    };
    let generated = format!(
        "
// Generated.
{constants}{}{}{}{}{}{}
fn gradient_at(at: u32) -> f32 {{
    return {element};
}}

fn gradients_at(at4: u32) -> vec4<f32> {{
    return from_{g}(gradients[at4]);
}}

fn parameters_at(at4: u32) -> vec4<f32> {{
    return from_{p}(parameters[at4]);
}}

fn keep_parameters(at4: u32, x: vec4<f32>) {{
    parameters[at4] = to_{p}(x);
}}
",
        row(program.coefficients.len()),
        binding(0, "read_write", "parameters", &format!("array<{parameter}>")),
        binding(1, "read", "gradients", &format!("array<{gradient}>")),
        binding(2, "read", "table", "Tensors"),
        binding(3, "read", "work", "Work"),
        memory.concat(),
    );
    let text = [REAL, STORAGE, DOUBLE, STEP, FRAME, GUARD, TENSOR, rule.shader(), &generated].join("\n");
    let mut written = vec![true, false, false, false];
    written.resize(FIRST_SLOT_BINDING as usize + memory.len(), true);
    Module { text, entry: pass.entry, written }
}

/// The first pass of the guard over gradients of this type: gradients, chunks, control words, partial sums.
pub fn measure(gradient: Dtype) -> Module {
    let (ty, g) = storage(gradient);
    let generated = format!(
        "
// Generated.
struct Work {{ control: Control }}
{}{}{}{}
fn gradient_at(at: u32) -> vec4<f32> {{
    return from_{g}(gradients[at]);
}}
",
        binding(0, "read", "gradients", &format!("array<{ty}>")),
        binding(1, "read", "table", "Table"),
        binding(2, "read", "work", "Work"),
        binding(3, "read_write", "partials", "array<Partial>"),
    );
    let text = [REAL, STORAGE, DOUBLE, STEP, GUARD, MEASURE, &generated].join("\n");
    Module { text, entry: "measure", written: vec![false, false, false, true] }
}

/// The second pass of the guard: partial sums, control words.
pub fn decide() -> Module {
    let generated = format!(
        "
// Generated.
struct Work {{ control: Control }}
{}{}",
        binding(0, "read", "partials", "array<Partial>"),
        binding(1, "read_write", "work", "Work"),
    );
    let text = [REAL, DOUBLE, STEP, GUARD, DECIDE, &generated].join("\n");
    Module { text, entry: "decide", written: vec![false, true] }
}

/// Gradients of this type added to sums, or put in their place where a chunk's `row` is 0: sums, gradients, chunks.
pub fn sum_into(gradient: Dtype) -> Module {
    let (ty, g) = storage(gradient);
    let generated = format!(
        "
// Generated.
{}{}{}
fn change(chunk: Chunk, i: u32) {{
    let x = from_{g}(gradients[chunk.gradient4 + i]);
    let sum = sums[chunk.start4 + i];
    let inside = lanes_inside(i, chunk.len);
    sums[chunk.start4 + i] = select(vec4<f32>(0.0), select(sum + x, x, chunk.row == 0u), inside);
}}
",
        binding(0, "read_write", "sums", "array<vec4<f32>>"),
        binding(1, "read", "gradients", &format!("array<{ty}>")),
        binding(2, "read", "table", "Table"),
    );
    let text = [REAL, STORAGE, STEP, GRADIENTS, &generated].join("\n");
    Module { text, entry: "each_chunk", written: vec![true, false, false] }
}

/// Gradients of this type multiplied by the control words' factor: gradients, chunks, control words.
pub fn scale(gradient: Dtype) -> Module {
    let (ty, g) = storage(gradient);
    let generated = format!(
        "
// Generated.
struct Work {{ control: Control }}
{}{}{}
fn change(chunk: Chunk, i: u32) {{
    let x = from_{g}(gradients[chunk.gradient4 + i]) * bitcast<f32>(work.control.factor);
    gradients[chunk.gradient4 + i] = to_{g}(select(vec4<f32>(0.0), x, lanes_inside(i, chunk.len)));
}}
",
        binding(0, "read_write", "gradients", &format!("array<{ty}>")),
        binding(1, "read", "table", "Table"),
        binding(2, "read", "work", "Work"),
    );
    let text = [REAL, STORAGE, STEP, GRADIENTS, &generated].join("\n");
    Module { text, entry: "each_chunk", written: vec![true, false, false] }
}
