// Twin of src/rules/radam.rs.

struct Scalars {
    // 1 − β₁.
    one_minus_beta1: f32,
    // β₂.
    beta2: f32,
    // 1 − β₂.
    one_minus_beta2: f32,
    // 1 − β₁ᵗ.
    correction1: f32,
    // lr.
    lr: f32,
    // ε.
    eps: f32,
    // √(1 − β₂ᵗ).
    sqrt_correction2: f32,
    // rₜ; 0 while it does not apply.
    rectification: f32,
}

// The only variant.
fn radam(
    c: Scalars,
    p: vec4<f32>,
    g: vec4<f32>,
    m: ptr<function, vec4<f32>>,
    v: ptr<function, vec4<f32>>,
) -> vec4<f32> {
    moments(c.one_minus_beta1, c.beta2, c.one_minus_beta2, g, m, v);
    let stride = (*m / c.correction1) * c.lr;
    let adaptive = (1.0 / (sqrt(*v) + c.eps)) * c.sqrt_correction2;
    let rectified = (stride * adaptive) * c.rectification;
    return p - select(rectified, stride, c.rectification == 0.0);
}
