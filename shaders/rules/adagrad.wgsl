// Twin of src/rules/adagrad.rs.

struct Scalars {
    // 1 where the sum does not exist yet.
    first: f32,
    // τ.
    start: f32,
    // ε.
    eps: f32,
    // −lr/(1 + (t − 1)·η).
    neg_lr: f32,
}

// The only variant.
fn adagrad(c: Scalars, p: vec4<f32>, g: vec4<f32>, s: ptr<function, vec4<f32>>) -> vec4<f32> {
    let before = select(*s, vec4<f32>(c.start), c.first == 1.0);
    *s = before + g * g;
    return p + (c.neg_lr * g) / (sqrt(*s) + c.eps);
}
