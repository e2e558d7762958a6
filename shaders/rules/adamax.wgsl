// Twin of src/rules/adamax.rs.

struct Scalars {
    // 1 − β₁.
    one_minus_beta1: f32,
    // β₂.
    beta2: f32,
    // ε.
    eps: f32,
    // −lr/(1 − β₁ᵗ).
    neg_step_size: f32,
}

// The only variant.
fn adamax(
    c: Scalars,
    p: vec4<f32>,
    g: vec4<f32>,
    m: ptr<function, vec4<f32>>,
    u: ptr<function, vec4<f32>>,
) -> vec4<f32> {
    *m = lerp(*m, g, c.one_minus_beta1);
    *u = max_nan(*u * c.beta2, abs(g) + c.eps);
    return p + (c.neg_step_size * *m) / *u;
}
