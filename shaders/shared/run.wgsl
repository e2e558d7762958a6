// Twin of src/cpu/run.rs: the loop that every rule's kernel runs through.
//
//     for each element:
//         g within ±bound                     where gradients are clipped by value
//         g = ±scale·g                        maximize and gradient scale: one exact factor
//         g = g + λ·θ    or    θ = θ·(1 − lr·λ)
//         θ, slots = kernel(θ, g, slots)      the rule
//         slots below the smallest normal number become 0
//
// One workgroup handles one chunk of one tensor; the chunk names the row of coefficients. The function
// `update`, the bindings and the struct `Row` are generated for each kernel: see src/shader.rs.

// The grid has two axes where the chunks are more than one axis may hold.
@compute @workgroup_size(WORKGROUP)
fn step(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = workgroup.x + workgroup.y * grid.x;
    if (index >= arrayLength(&table.chunks) || work.control.skip != 0u) {
        return;
    }
    let chunk = table.chunks[index];
    let control = work.control;
    let row = work.rows[chunk.row];
    for (var i = lane; 4u * i < chunk.len; i += WORKGROUP) {
        update(row, control, chunk.start4 + i, chunk.gradient4 + i, lanes_inside(i, chunk.len));
    }
}
