// Twin of src/rules/average.rs.

struct Scalars {
    // 1 in the first update, else 0.
    first: f32,
    // n, β or w.
    a: f32,
    // 1 − β.
    b: f32,
}

// Equal weights.
fn average_equal(c: Scalars, p: vec4<f32>, x: vec4<f32>) -> vec4<f32> {
    return select(p + (x - p) / c.a, x, c.first == 1.0);
}

// Exponential weights.
fn average_exponential(c: Scalars, p: vec4<f32>, x: vec4<f32>) -> vec4<f32> {
    return select(c.a * p + c.b * x, x, c.first == 1.0);
}

// Either, from the difference.
fn average_lerp(c: Scalars, p: vec4<f32>, x: vec4<f32>) -> vec4<f32> {
    return select(lerp(p, x, c.a), x, c.first == 1.0);
}
