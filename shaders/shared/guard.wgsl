// Twin of src/optimizer/guard.rs: norm, clip factor and what is not finite, decided on the device.
//
//     measure   each chunk: Σx² of its gradients within the bound, scaled by the largest of them; not finite ones
//     decide    all chunks: norm = √Σ, factor = min(1, max_norm/(norm + 1e-6)), whether to skip
//
// Sums are double-floats, so that factor and norm are the CPU's but for rare roundings (docs/numerics.md). The
// bindings and the function `gradient_at` are generated: see src/shader.rs.

// Σx² = (hi + lo)·4^exponent of the finite numbers of a chunk.
struct Partial {
    hi: f32,
    lo: f32,
    exponent: i32,
    found: u32,
}

var<workgroup> lanes_hi: array<vec4<f32>, WORKGROUP>;
var<workgroup> lanes_lo: array<vec4<f32>, WORKGROUP>;
var<workgroup> lanes_bits: array<u32, WORKGROUP>;

// The largest of the lanes' numbers.
fn largest_of_lanes(lane: u32, value: u32) -> u32 {
    lanes_bits[lane] = value;
    workgroupBarrier();
    for (var width = WORKGROUP / 2u; width > 0u; width = width >> 1u) {
        if (lane < width) {
            lanes_bits[lane] = max(lanes_bits[lane], lanes_bits[lane + width]);
        }
        workgroupBarrier();
    }
    let largest = workgroupUniformLoad(&lanes_bits[0]);
    workgroupBarrier();
    return largest;
}

// The bits that are set in any of the lanes' numbers.
fn any_of_lanes(lane: u32, value: u32) -> u32 {
    lanes_bits[lane] = value;
    workgroupBarrier();
    for (var width = WORKGROUP / 2u; width > 0u; width = width >> 1u) {
        if (lane < width) {
            lanes_bits[lane] = lanes_bits[lane] | lanes_bits[lane + width];
        }
        workgroupBarrier();
    }
    let all = workgroupUniformLoad(&lanes_bits[0]);
    workgroupBarrier();
    return all;
}

// The sum over lanes and components, in each component; right in lane 0.
fn sum_of_lanes(lane: u32, value: Double) -> Double {
    lanes_hi[lane] = value.hi;
    lanes_lo[lane] = value.lo;
    workgroupBarrier();
    for (var width = WORKGROUP / 2u; width > 0u; width = width >> 1u) {
        if (lane < width) {
            let sum = add(
                Double(lanes_hi[lane], lanes_lo[lane]),
                Double(lanes_hi[lane + width], lanes_lo[lane + width]),
            );
            lanes_hi[lane] = sum.hi;
            lanes_lo[lane] = sum.lo;
        }
        workgroupBarrier();
    }
    return across(Double(lanes_hi[0], lanes_lo[0]));
}

fn magnitude_bits(x: vec4<f32>) -> vec4<u32> {
    return bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu);
}

fn largest_of_four(x: vec4<u32>) -> u32 {
    return max(max(x.x, x.y), max(x.z, x.w));
}

// What is not finite among the four.
fn found_in(x: vec4<f32>) -> u32 {
    let infinite = any(magnitude_bits(x) == vec4<u32>(0x7f800000u));
    return select(0u, HAS_NAN, any(is_nan(x))) | select(0u, HAS_INFINITY, infinite);
}

fn finite_part(x: vec4<f32>) -> vec4<f32> {
    return select(vec4<f32>(0.0), x, magnitude_bits(x) < vec4<u32>(0x7f800000u));
}

// x·2^-exponent in two steps: one factor alone may be subnormal.
fn lowered(x: vec4<f32>, exponent: i32) -> vec4<f32> {
    let half = -exponent / 2;
    return opaque(x * power_of_two(half)) * power_of_two(-exponent - half);
}
