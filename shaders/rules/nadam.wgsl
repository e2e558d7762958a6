// Twin of src/rules/nadam.rs.

struct Scalars {
    // 1 − β₁.
    one_minus_beta1: f32,
    // β₂.
    beta2: f32,
    // 1 − β₂.
    one_minus_beta2: f32,
    // 1 − β₂ᵗ.
    correction2: f32,
    // ε.
    eps: f32,
    // −lr·(1 − μₜ)/(1 − Pₜ).
    gradient_step: f32,
    // −lr·μₜ₊₁/(1 − Pₜ·μₜ₊₁).
    moment_step: f32,
}

// The only variant.
fn nadam(
    c: Scalars,
    p: vec4<f32>,
    g: vec4<f32>,
    m: ptr<function, vec4<f32>>,
    v: ptr<function, vec4<f32>>,
) -> vec4<f32> {
    moments(c.one_minus_beta1, c.beta2, c.one_minus_beta2, g, m, v);
    let a = sqrt(*v / c.correction2) + c.eps;
    let ahead = p + (c.gradient_step * g) / a;
    return ahead + (c.moment_step * *m) / a;
}
