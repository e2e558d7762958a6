// Numbers of about 48 bits: unevaluated sums of two f32, four at a time.
//
// Dekker: A floating-point technique for extending the available precision, 1971; Ogita, Rump, Oishi: Accurate sum
// and dot product, 2005. They live on what rounding loses, which WGSL allows compilers to optimize away: hence
// `opaque`. Values must be far from overflow and underflow: see `exponent_of` and `scaled`.

struct Double {
    hi: vec4<f32>,
    // At most half an ulp of hi.
    lo: vec4<f32>,
}

// A zero that compilers cannot know: every entry point sets it from memory.
var<private> unseen_zero: u32;

// x, of which the compiler cannot tell where it came from.
fn opaque(x: vec4<f32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(bitcast<vec4<u32>>(x) ^ vec4<u32>(unseen_zero));
}

fn double(x: vec4<f32>) -> Double {
    return Double(x, vec4<f32>(0.0));
}

// a + b, exactly.
fn two_sum(a: vec4<f32>, b: vec4<f32>) -> Double {
    let sum = opaque(a + b);
    let b_part = opaque(sum - a);
    let a_part = opaque(sum - b_part);
    return Double(sum, opaque(a - a_part) + opaque(b - b_part));
}

// a + b, exactly, where |a| >= |b|.
fn quick_two_sum(a: vec4<f32>, b: vec4<f32>) -> Double {
    let sum = opaque(a + b);
    return Double(sum, b - opaque(sum - a));
}

// The upper 12 bits, rounded.
fn upper(x: vec4<f32>) -> vec4<f32> {
    return bitcast<vec4<f32>>((bitcast<vec4<u32>>(x) + vec4<u32>(0x800u)) & vec4<u32>(0xfffff000u));
}

// a·b, exactly.
fn two_product(a: vec4<f32>, b: vec4<f32>) -> Double {
    let product = opaque(a * b);
    let a_hi = upper(a);
    let b_hi = upper(b);
    let a_lo = opaque(a - a_hi);
    let b_lo = opaque(b - b_hi);
    let first = opaque(opaque(a_hi * b_hi) - product);
    let second = opaque(first + opaque(a_hi * b_lo));
    let third = opaque(second + opaque(a_lo * b_hi));
    return Double(product, third + opaque(a_lo * b_lo));
}

fn add(a: Double, b: Double) -> Double {
    let s = two_sum(a.hi, b.hi);
    let t = two_sum(a.lo, b.lo);
    let u = quick_two_sum(s.hi, s.lo + t.hi);
    return quick_two_sum(u.hi, u.lo + t.lo);
}

// sum + a·b.
fn add_product(sum: Double, a: vec4<f32>, b: vec4<f32>) -> Double {
    return add(sum, two_product(a, b));
}

fn negated(a: Double) -> Double {
    return Double(-a.hi, -a.lo);
}

fn times(a: Double, b: Double) -> Double {
    let p = two_product(a.hi, b.hi);
    return quick_two_sum(p.hi, p.lo + (opaque(a.hi * b.lo) + opaque(a.lo * b.hi)));
}

// Each quotient of f32 corrects the one before, however roughly the device divides.
fn divided(a: Double, b: Double) -> Double {
    let q1 = opaque(a.hi / b.hi);
    let r1 = add(a, negated(times(b, double(q1))));
    let q2 = opaque(r1.hi / b.hi);
    let r2 = add(r1, negated(times(b, double(q2))));
    let q3 = opaque(r2.hi / b.hi);
    return add(quick_two_sum(q1, q2), double(q3));
}

// The square root; 0 of 0.
fn root(a: Double) -> Double {
    let x = max(opaque(sqrt(a.hi)), vec4<f32>(1e-30));
    let first = quick_two_sum(x, opaque(add(a, negated(two_product(x, x))).hi / (2.0 * x)));
    let rest = add(a, negated(times(first, first)));
    let whole = add(first, double(opaque(rest.hi / (2.0 * x))));
    let is_zero = a.hi <= vec4<f32>(0.0);
    return Double(select(whole.hi, vec4<f32>(0.0), is_zero), select(whole.lo, vec4<f32>(0.0), is_zero));
}

// The sum of the four, in each of the four.
fn across(a: Double) -> Double {
    let pairs = add(a, Double(a.hi.zwxy, a.lo.zwxy));
    return add(pairs, Double(pairs.hi.yxwz, pairs.lo.yxwz));
}

// 2^e, for e in [-126, 127].
fn power_of_two(e: i32) -> f32 {
    return bitcast<f32>(u32(e + 127) << 23u);
}

// x·2^e, for any e; rounded where the result is subnormal, infinite where it is too large.
fn scaled(x: f32, e: i32) -> f32 {
    let within = clamp(e, -378, 378);
    let third = within / 3;
    return opaque(vec4<f32>(opaque(vec4<f32>(x * power_of_two(third))) * power_of_two(third))).x
        * power_of_two(within - 2 * third);
}

fn double_scaled(a: Double, e: i32) -> Double {
    let factor = power_of_two(clamp(e, -126, 127));
    return Double(a.hi * factor, a.lo * factor);
}

// The exponent of the largest power of two that is not above the magnitude with these bits; that of the smallest
// normal number for all below it.
fn exponent_of(magnitude_bits: u32) -> i32 {
    return max(i32((magnitude_bits & 0x7f800000u) >> 23u), 1) - 127;
}
