// What all passes of one step share: its table of chunks and its control words.

override WORKGROUP: u32 = 64u;

// Part of one tensor, updated by one workgroup.
struct Chunk {
    // First vec4 in the bound window of the parameters' and slots' arenas.
    start4: u32,
    // Elements; the lanes past the last one stay zero.
    len: u32,
    // Which row of coefficients.
    row: u32,
    // First vec4 in the bound gradients.
    gradient4: u32,
}

struct Table {
    // Number of the first chunk among those of all dispatches of the step.
    first: u32,
    unused0: u32,
    unused1: u32,
    unused2: u32,
    chunks: array<Chunk>,
}

const BOUNDED: u32 = 1u;
const CLIPS_NORM: u32 = 2u;
const SKIPS: u32 = 4u;

const HAS_INFINITY: u32 = 1u;
const HAS_NAN: u32 = 2u;

// Written by the host before the step; the guard's passes put their results into the first words.
struct Control {
    // What every gradient is multiplied by, as bits: it may be NaN, which WGSL has no text for.
    factor: u32,
    // Whether the update is left out.
    skip: u32,
    // The norm of the gradients: (hi + lo)·2^exponent, of those that are finite.
    norm_hi: f32,
    norm_lo: f32,
    norm_exponent: i32,
    // What was found among the gradients that is not finite.
    found: u32,
    // 0, for `unseen_zero`.
    zero: u32,
    // Chunks of all dispatches.
    chunks: u32,
    // Which of the constants above hold.
    switches: u32,
    // The largest magnitude of an element.
    bound: f32,
    // The largest norm, (hi + lo)·2^exponent.
    max_hi: f32,
    max_lo: f32,
    max_exponent: i32,
    // What is added to the norm before it divides.
    epsilon_hi: f32,
    epsilon_lo: f32,
    // The gradients were multiplied by two to this power.
    scale_exponent: i32,
}

// An element within the bound. NaN stays.
fn within_bound(control_switches: u32, bound: f32, x: vec4<f32>) -> vec4<f32> {
    let is_bounded = vec4<bool>((control_switches & BOUNDED) != 0u);
    let below = select(x, vec4<f32>(bound), is_bounded & (x > vec4<f32>(bound)));
    return select(below, vec4<f32>(-bound), is_bounded & (below < vec4<f32>(-bound)));
}

// Which of the four elements from element 4·i on are among the first `len`.
fn lanes_inside(i: u32, len: u32) -> vec4<bool> {
    return 4u * i + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(len);
}
