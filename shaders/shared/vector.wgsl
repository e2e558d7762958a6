// Operations on whole vectors: twin of `add_scaled`, `scale` and `reduce` in src/closure/vector.rs.
//
// A workgroup does one block of BLOCK elements of one window, that of a sum in src/linear.rs. Sums are of blocks; the
// host joins them. Windows are bound as bits: WGSL may assume that there is neither NaN nor infinity, and flush
// subnormal numbers.

override WORKGROUP: u32 = 64u;
const BLOCK4: u32 = 1024u;
// The largest workgroup.
const MOST_LANES: u32 = 256u;

struct Operation {
    factor: f32,
    // Elements start to end of the window; others count as zero.
    start: u32,
    end: u32,
    // Where the result of the first block goes.
    result: u32,
    // Whether a sum is that of magnitudes.
    is_sum_abs: u32,
    // 0, which the compiler does not know.
    zero: u32,
}

@group(0) @binding(0) var<uniform> operation: Operation;
// Elements, or one result for each block.
@group(0) @binding(1) var<storage, read_write> out: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> y: array<vec4<u32>>;

// out = x + factor·y
@compute @workgroup_size(WORKGROUP)
fn add_scaled(@builtin(workgroup_id) block: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let first = block.x * BLOCK4;
    for (var i = first + lane; i < first + BLOCK4 && 4u * i < operation.end; i += WORKGROUP) {
        let sum = bitcast<vec4<f32>>(x[i]) + operation.factor * bitcast<vec4<f32>>(y[i]);
        out[i] = bitcast<vec4<u32>>(sum);
    }
}

// out = factor·x
@compute @workgroup_size(WORKGROUP)
fn scale(@builtin(workgroup_id) block: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let first = block.x * BLOCK4;
    for (var i = first + lane; i < first + BLOCK4 && 4u * i < operation.end; i += WORKGROUP) {
        out[i] = bitcast<vec4<u32>>(operation.factor * bitcast<vec4<f32>>(x[i]));
    }
}

const MAGNITUDE: u32 = 0x7fffffffu;
const INFINITE: u32 = 0x7f800000u;
const ONE: u32 = 0x3f800000u;
// Exponent of zero: below that of any product.
const LOWEST: i32 = -1000;
// What is in a sum.
const HAS_NAN: u32 = 1u;
const HAS_PLUS_INFINITY: u32 = 2u;
const HAS_MINUS_INFINITY: u32 = 4u;

// Which of the four elements at this index count.
fn inside(index: u32) -> vec4<bool> {
    let at = 4u * index + vec4<u32>(0u, 1u, 2u, 3u);
    return (at >= vec4<u32>(operation.start)) & (at < vec4<u32>(operation.end));
}

// A number as significand·2^exponent.
struct Split {
    // Magnitude in [1, 2), or 0.
    significand: vec4<f32>,
    exponent: vec4<i32>,
}

fn split(bits: vec4<u32>) -> Split {
    let magnitude = bits & vec4<u32>(MAGNITUDE);
    let is_below_normal = magnitude < vec4<u32>(0x00800000u);
    // A subnormal number is a whole number of 2^-149, and that whole number is normal.
    let normal = select(magnitude, bitcast<vec4<u32>>(vec4<f32>(magnitude)), is_below_normal);
    let exponent = vec4<i32>(normal >> vec4<u32>(23u)) - 127 - select(vec4<i32>(0), vec4<i32>(149), is_below_normal);
    let significand = (normal & vec4<u32>(0x007fffffu)) | vec4<u32>(ONE) | (bits & vec4<u32>(0x80000000u));
    let is_zero = magnitude == vec4<u32>(0u);
    return Split(
        bitcast<vec4<f32>>(select(significand, vec4<u32>(0u), is_zero)),
        select(exponent, vec4<i32>(LOWEST), is_zero),
    );
}

// The factors of four terms of a sum.
struct Factors {
    x: vec4<u32>,
    y: vec4<u32>,
}

fn factors(index: u32) -> Factors {
    let counts = inside(index);
    let a = select(vec4<u32>(0u), x[index], counts);
    if (operation.is_sum_abs != 0u) {
        return Factors(a & vec4<u32>(MAGNITUDE), vec4<u32>(ONE));
    }
    return Factors(a, select(vec4<u32>(0u), y[index], counts));
}

// What makes a sum of these products infinite or NaN.
fn special(f: Factors) -> u32 {
    let a = f.x & vec4<u32>(MAGNITUDE);
    let b = f.y & vec4<u32>(MAGNITUDE);
    let infinite = vec4<u32>(INFINITE);
    let is_infinite = (a == infinite) | (b == infinite);
    let is_nan = (a > infinite) | (b > infinite) | (is_infinite & ((a == vec4<u32>(0u)) | (b == vec4<u32>(0u))));
    let is_negative = ((f.x ^ f.y) & vec4<u32>(0x80000000u)) != vec4<u32>(0u);
    return select(0u, HAS_NAN, any(is_nan))
        | select(0u, HAS_PLUS_INFINITY, any(is_infinite & !is_negative))
        | select(0u, HAS_MINUS_INFINITY, any(is_infinite & is_negative));
}

var<workgroup> top: atomic<i32>;
var<workgroup> specials: atomic<u32>;
var<workgroup> sums_hi: array<vec4<f32>, MOST_LANES>;
var<workgroup> sums_lo: array<vec4<f32>, MOST_LANES>;

// For each block Σ x·y: two f32 that are added, a power of two that they are multiplied by, and what is special.
//
// The terms of a block are scaled by the exponent of the largest, so that none overflows, and what vanishes is
// too small to count beside it.
@compute @workgroup_size(WORKGROUP)
fn sum(@builtin(workgroup_id) block: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    unseen_zero = operation.zero;
    let first = block.x * BLOCK4;
    if (lane == 0u) {
        atomicStore(&top, 2 * LOWEST);
        atomicStore(&specials, 0u);
    }
    workgroupBarrier();
    var highest = vec4<i32>(2 * LOWEST);
    var found = 0u;
    for (var i = first + lane; i < first + BLOCK4 && 4u * i < operation.end; i += WORKGROUP) {
        let f = factors(i);
        highest = max(highest, split(f.x).exponent + split(f.y).exponent);
        found |= special(f);
    }
    atomicMax(&top, max(max(highest.x, highest.y), max(highest.z, highest.w)));
    if (found != 0u) {
        atomicOr(&specials, found);
    }
    workgroupBarrier();
    let exponent = atomicLoad(&top);
    var total = double(vec4<f32>(0.0));
    for (var i = first + lane; i < first + BLOCK4 && 4u * i < operation.end; i += WORKGROUP) {
        let f = factors(i);
        let a = split(f.x);
        let b = split(f.y);
        let product = two_product(a.significand, b.significand);
        let shift = a.exponent + b.exponent - exponent;
        let power = bitcast<vec4<f32>>(vec4<u32>(max(shift, vec4<i32>(-126)) + 127) << vec4<u32>(23u));
        let factor = select(power, vec4<f32>(0.0), shift < vec4<i32>(-126));
        total = add(total, Double(product.hi * factor, product.lo * factor));
    }
    sums_hi[lane] = total.hi;
    sums_lo[lane] = total.lo;
    for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (lane < half) {
            let other = lane + half;
            let pair = add(Double(sums_hi[lane], sums_lo[lane]), Double(sums_hi[other], sums_lo[other]));
            sums_hi[lane] = pair.hi;
            sums_lo[lane] = pair.lo;
        }
    }
    if (lane == 0u) {
        let all = across(Double(sums_hi[0], sums_lo[0]));
        let words = vec4<u32>(bitcast<u32>(all.hi.x), bitcast<u32>(all.lo.x), bitcast<u32>(exponent), 0u);
        out[operation.result + block.x] = words | vec4<u32>(0u, 0u, 0u, atomicLoad(&specials));
    }
}

var<workgroup> top_bits: atomic<u32>;

// For each block the bits of max|x|: those of NaN are the largest.
@compute @workgroup_size(WORKGROUP)
fn largest(@builtin(workgroup_id) block: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let first = block.x * BLOCK4;
    if (lane == 0u) {
        atomicStore(&top_bits, 0u);
    }
    workgroupBarrier();
    var highest = vec4<u32>(0u);
    for (var i = first + lane; i < first + BLOCK4 && 4u * i < operation.end; i += WORKGROUP) {
        highest = max(highest, select(vec4<u32>(0u), x[i] & vec4<u32>(MAGNITUDE), inside(i)));
    }
    atomicMax(&top_bits, max(max(highest.x, highest.y), max(highest.z, highest.w)));
    workgroupBarrier();
    if (lane == 0u) {
        out[operation.result + block.x] = vec4<u32>(atomicLoad(&top_bits), 0u, 0u, 0u);
    }
}
