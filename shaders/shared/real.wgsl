// Twin of src/real.rs: what the rules compute with, on four elements at once.
//
// Each operation rounds once; nothing is fused or reordered by hand. WGSL lets an implementation assume
// that NaN and infinity do not occur and flush subnormal numbers, so whatever must see them looks at bits.

fn is_nan(x: vec4<f32>) -> vec4<bool> {
    return (bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
}

// Zero or subnormal: the exponent field is zero.
fn is_below_normal(x: vec4<f32>) -> vec4<bool> {
    return (bitcast<vec4<u32>>(x) & vec4<u32>(0x7f800000u)) == vec4<u32>(0u);
}

// The larger of two numbers; NaN where either is NaN.
fn max_nan(a: vec4<f32>, b: vec4<f32>) -> vec4<f32> {
    let larger = select(b, a, a > b);
    return select(select(larger, b, is_nan(b)), a, is_nan(a));
}

// `a + w·(b − a)`, or from the other end where `|w| ≥ 1/2`, so that `w = 1` gives `b` exactly.
fn lerp(a: vec4<f32>, b: vec4<f32>, w: f32) -> vec4<f32> {
    let delta = b - a;
    let near_a = a + w * delta;
    let near_b = b + (w - 1.0) * delta;
    return select(near_b, near_a, abs(w) < 0.5);
}
