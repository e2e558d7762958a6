// Twin of src/rules/adam.rs.

struct Scalars {
    // 1 − β₁.
    one_minus_beta1: f32,
    // β₂.
    beta2: f32,
    // 1 − β₂.
    one_minus_beta2: f32,
    // √(1 − β₂ᵗ).
    sqrt_correction2: f32,
    // ε.
    eps: f32,
    // −lr/(1 − β₁ᵗ).
    neg_step_size: f32,
}

fn descend(c: Scalars, p: vec4<f32>, m: vec4<f32>, v: vec4<f32>) -> vec4<f32> {
    let denominator = sqrt(v) / c.sqrt_correction2 + c.eps;
    return p + (c.neg_step_size * m) / denominator;
}

// Without amsgrad.
fn adam(
    c: Scalars,
    p: vec4<f32>,
    g: vec4<f32>,
    m: ptr<function, vec4<f32>>,
    v: ptr<function, vec4<f32>>,
) -> vec4<f32> {
    moments(c.one_minus_beta1, c.beta2, c.one_minus_beta2, g, m, v);
    return descend(c, p, *m, *v);
}

// With amsgrad.
fn adam_amsgrad(
    c: Scalars,
    p: vec4<f32>,
    g: vec4<f32>,
    m: ptr<function, vec4<f32>>,
    v: ptr<function, vec4<f32>>,
    v_max: ptr<function, vec4<f32>>,
) -> vec4<f32> {
    moments(c.one_minus_beta1, c.beta2, c.one_minus_beta2, g, m, v);
    *v_max = max_nan(*v_max, *v);
    return descend(c, p, *m, *v_max);
}
