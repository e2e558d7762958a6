// Twin of src/rules/adadelta.rs.

struct Scalars {
    // ρ.
    rho: f32,
    // 1 − ρ.
    one_minus_rho: f32,
    // ε.
    eps: f32,
    // −lr.
    neg_lr: f32,
}

// The only variant.
fn adadelta(
    c: Scalars,
    p: vec4<f32>,
    g: vec4<f32>,
    v: ptr<function, vec4<f32>>,
    a: ptr<function, vec4<f32>>,
) -> vec4<f32> {
    *v = *v * c.rho + (c.one_minus_rho * g) * g;
    let delta = (sqrt(*a + c.eps) / sqrt(*v + c.eps)) * g;
    *a = *a * c.rho + (c.one_minus_rho * delta) * delta;
    return p + c.neg_lr * delta;
}
