// Twin of src/rules/sgd.rs.

struct Scalars {
    // −lr.
    neg_lr: f32,
    // μ.
    momentum: f32,
    // 1 − τ.
    one_minus_dampening: f32,
    // 1 where the buffer does not exist yet.
    first: f32,
    // 1 with Nesterov momentum.
    nesterov: f32,
}

// `θ − lr·g`.
fn sgd(c: Scalars, p: vec4<f32>, g: vec4<f32>) -> vec4<f32> {
    return p + c.neg_lr * g;
}

// With a momentum buffer.
fn sgd_momentum(c: Scalars, p: vec4<f32>, g: vec4<f32>, b: ptr<function, vec4<f32>>) -> vec4<f32> {
    let decayed = *b * c.momentum + c.one_minus_dampening * g;
    *b = select(decayed, g, c.first == 1.0);
    let ahead = g + c.momentum * *b;
    let u = select(*b, ahead, c.nesterov == 1.0);
    return p + c.neg_lr * u;
}
